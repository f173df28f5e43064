"""Samples -> a model: python jobs/train.py --config jobs/configs/demo.yaml"""

from mixer_platform.cli import main
from mixer_platform.train.job import train

if __name__ == "__main__":
    main(train, __doc__)
