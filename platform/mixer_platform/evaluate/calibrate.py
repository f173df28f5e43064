"""What a score of the index is worth, learned from the photos whose answers are known, and kept beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixer.calibration import expected_calibration_error, fit_calibration, held_out_probabilities, reliability
from mixer_platform import versions
from mixer_platform.errors import ConflictError
from mixer_platform.gallery import calibration_key
from mixer_platform.storage import Storage

DEPTH = 10  # found items of a photo: what is far from every photo would teach nothing but that it is far
_KEPT = ("slope", "intercept", "photos", "pairs", "ece")


def calibrate(
    results: Sequence[Sequence[tuple[float, dict[str, Any]]]], relevant: Sequence[set[str]]
) -> dict[str, Any] | None:
    """Fit P(same product | score) on each photo's first found items; return what a report says of it.

    `ece`, the expected calibration error, and `reliability` (mean probability, share of right ones, pairs) are of
    photos that the fit had not seen. None if everything found is right, or nothing.
    """
    pairs = [
        (score, item["item_id"] in wanted, photo)
        for photo, (found, wanted) in enumerate(zip(results, relevant, strict=True))
        for score, item in found[:DEPTH]
    ]
    scores, right, photos = (np.array(column) for column in zip(*pairs, strict=True)) if pairs else (np.zeros(0),) * 3
    if not 0 < np.count_nonzero(right) < len(right):
        return None
    fitted = fit_calibration(scores, right)
    held_out = held_out_probabilities(scores, right, photos)
    bins = reliability(held_out, right)
    return {
        "slope": fitted.slope,
        "intercept": fitted.intercept,
        "photos": len(np.unique(photos)),
        "pairs": len(pairs),
        "right": int(right.sum()),
        "ece": round(expected_calibration_error(held_out, right), 4),
        "reliability": [[round(mean, 4), round(share, 4), count] for mean, share, count in bins],
    }


def keep_calibration(storage: Storage, report: dict[str, Any]) -> None:
    """Make a report's calibration that of its model, unless one of more photos is there already."""
    if not (fitted := report.get("calibration")):
        return
    key = calibration_key(report["model"])
    content = {"model": report["model"], **{name: fitted[name] for name in _KEPT}, "report": report["version"]}
    while True:
        tag = storage.tag(key)
        if tag and versions.read_json(storage, key)["photos"] > fitted["photos"]:
            return
        try:
            return storage.publish(key, versions.to_json(content), replaces=tag)
        except ConflictError:  # another evaluation of the same model: look whose photos are more
            continue
