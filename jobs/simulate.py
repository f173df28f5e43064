"""Drawings -> a marketplace with behaviour logs: python jobs/simulate.py --config jobs/configs/demo.yaml"""

from pathlib import Path
from typing import Any

from mixer_platform.cli import main
from mixer_platform.config import RunConfig
from mixer_platform.simulate.job import drawings_beside, simulate


def job(config: RunConfig) -> dict[str, Any]:
    """Make the marketplace in the folder `data`; downloads are kept beside it."""
    return simulate(config.simulate, Path(config.data), drawings_beside(Path(config.data)))


if __name__ == "__main__":
    main(job, __doc__, on_ray=False)
