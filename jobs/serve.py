"""A published index -> an HTTP service: python jobs/serve.py --config jobs/configs/demo.yaml"""

from mixer_platform.serve.ingress import prepare

ENVIRONMENT = prepare()  # before anything imports Ray Serve

from mixer_platform.cli import main  # noqa: E402
from mixer_platform.serve.job import serve, wait_for_interrupt  # noqa: E402

if __name__ == "__main__":
    config = main(serve, __doc__, environment=ENVIRONMENT)
    if config.serve.keep_up:
        wait_for_interrupt()
