"""Run by each rank of a launch: trains one config after the other, and says what each left in its swap folder.

Arguments: config files. <run>/swapped-<rank>.json: bytes of each file there, by name, before the process clears it.
"""

import json
import os
import sys

from xlscale.config import load_config
from xlscale.parallel.engine_config import swap_folder
from xlscale.training.loop import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        config = load_config(path)
        train(config)
        rank = os.environ["RANK"]
        files = {file.name: file.stat().st_size for file in swap_folder(config).rglob(f"rank{rank}/*.swp")}
        (config.run_dir / f"swapped-{rank}.json").write_text(json.dumps(files))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
