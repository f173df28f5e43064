"""Items and a model -> a published index, and its life: python jobs/index.py build --config jobs/configs/demo.yaml

Commands: build (default), update, compact, publish, rollback, gc, describe, unusable, verify; see docs/index.md.
"""

from mixer_platform.cli import main
from mixer_platform.index.job import build, compact, update
from mixer_platform.index.lifecycle import describe, gc, publish, rollback, unusable, verify

ON_RAY = {"build": build, "update": update, "compact": compact}
ALONE = {
    "publish": publish,
    "rollback": rollback,
    "gc": gc,
    "describe": describe,
    "unusable": unusable,
    "verify": verify,
}

if __name__ == "__main__":
    main(ON_RAY | ALONE, __doc__, on_ray=tuple(ON_RAY))
