"""Items and a model -> a published index: python jobs/index.py --config jobs/configs/demo.yaml"""

from mixer_platform.cli import main
from mixer_platform.index.job import build

if __name__ == "__main__":
    main(build, __doc__)
