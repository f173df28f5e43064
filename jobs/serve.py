"""A published index -> an HTTP service: python jobs/serve.py --config jobs/configs/demo.yaml"""

from mixer_platform.cli import main
from mixer_platform.serve.job import serve, wait_for_interrupt

if __name__ == "__main__":
    config = main(serve, __doc__)
    if config.serve.keep_up:
        wait_for_interrupt()
