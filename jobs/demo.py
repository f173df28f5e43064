"""The whole job on this machine, stage by stage: python jobs/demo.py [--data FOLDER]"""

from mixer_platform.demo.job import main

if __name__ == "__main__":
    main(__doc__)
