"""Photos: the drawing is in them, they differ, and the same seed takes the same one."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mixer_platform.simulate.photos import DRAWING_SIZE, catalog_picture, descriptor, photo, read_drawing

SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">
<rect x="18" y="27" width="36" height="18" fill="#ff0000"/></svg>"""


def png(colour, size=(64, 64), box=(16, 24, 48, 40)):
    picture = Image.new("RGBA", size)
    picture.paste(colour, box)
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("data", [SVG, png((255, 0, 0, 255))], ids=["svg", "png"])
def test_a_drawing_is_cut_to_what_is_drawn(data):
    drawing = read_drawing(data)
    assert drawing.mode == "RGBA"
    assert drawing.size == pytest.approx((DRAWING_SIZE, DRAWING_SIZE / 2), abs=2)
    assert drawing.getpixel((DRAWING_SIZE // 2, DRAWING_SIZE // 4)) == (255, 0, 0, 255)


def test_descriptors_of_like_drawings_are_closer_than_of_unlike_ones():
    red, drawn, blue = (descriptor(read_drawing(data)) for data in (png((255, 0, 0, 255)), SVG, png((0, 0, 255, 255))))
    assert red.shape == (256,)
    assert np.linalg.norm(red) == pytest.approx(1, abs=1e-5)
    assert red @ drawn > 0.99 > red @ blue


def test_catalogue_pictures_have_a_plain_background():
    picture = catalog_picture(read_drawing(SVG), 224)
    assert picture.mode == "RGB"
    assert picture.size == (224, 224)
    assert picture.getpixel((2, 2)) == (255, 255, 255)
    assert picture.getpixel((112, 112)) == (255, 0, 0)


def test_photos_follow_from_the_seed_and_show_the_drawing():
    drawing = read_drawing(SVG)
    shots = [np.asarray(photo(drawing, 96, np.random.default_rng(seed))) for seed in range(12)]
    assert all(shot.shape == (96, 96, 3) for shot in shots)
    np.testing.assert_array_equal(shots[5], np.asarray(photo(drawing, 96, np.random.default_rng(5))))
    assert len({shot.tobytes() for shot in shots}) == 12
    for shot in shots:  # red fills a fifth to a third of a 2:1 drawing that spans 0.5 to 0.8 of the side
        middle = shot[36:60, 36:60].astype(int)
        assert (middle[..., 0] - middle[..., 1:].max(-1) > 100).mean() > 0.3
