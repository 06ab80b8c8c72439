"""Run by each rank of a launch: trains one config after the other, each in process groups of its own.

Arguments: config files. MASTER_PORT is raised by one for each, so that no group waits for the last one's socket.
"""

import os
import sys

from xlscale.config import load_config
from xlscale.training.loop import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_config(path))
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
