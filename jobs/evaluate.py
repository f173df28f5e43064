"""Recall of the published index on known answers: python jobs/evaluate.py --config jobs/configs/demo.yaml"""

from mixer_platform.cli import main
from mixer_platform.evaluate.job import evaluate

if __name__ == "__main__":
    main(evaluate, __doc__)
