"""Run by each rank of a launch: an update that never ends, for what a signal does then.

Rank 0 waits for the others in a collective, and they sleep. Arguments: the grace in seconds, and a folder, in which the
file ready-<rank> says that a rank is there.
"""

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from xlscale.training.signals import Signals

if __name__ == "__main__":
    dist.init_process_group("gloo")
    with Signals(float(sys.argv[1])) as signals, signals.at_boundaries():
        (Path(sys.argv[2]) / f"ready-{os.environ['RANK']}").touch()
        if dist.get_rank():
            time.sleep(60)
        dist.barrier()
