"""Drawings -> a marketplace with behaviour logs: python jobs/simulate.py --config jobs/configs/demo.yaml"""

from typing import Any

from mixer_platform.cli import main
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError
from mixer_platform.simulate.job import drawings_beside, simulate
from mixer_platform.storage import LocalStorage, open_storage


def job(config: RunConfig) -> dict[str, Any]:
    """Make the marketplace in the folder `data`; downloads are kept beside it."""
    storage = open_storage(config.data)
    if not isinstance(storage, LocalStorage):
        raise InputError(f"data={config.data}: simulate writes to a folder; name one, and copy it where you want it")
    return simulate(config.simulate, storage.root, drawings_beside(storage.root))


if __name__ == "__main__":
    main(job, __doc__, on_ray=False)
