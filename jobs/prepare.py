"""Logs, queries and items -> weakly labelled samples: python jobs/prepare.py --config jobs/configs/demo.yaml"""

from mixer_platform.cli import main
from mixer_platform.prepare.job import prepare

if __name__ == "__main__":
    main(prepare, __doc__)
