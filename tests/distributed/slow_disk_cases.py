"""Run by each rank of a launch: trains with a disk that takes what a checkpoint's thread writes when it is told to.

Arguments: a folder, and config files, trained one after the other. In the folder:
  late           files of step-N are opened only after the record of so many updates after N, or of the last one
  hold-<rank>    while it is there, nothing of that rank is flushed
  fail-<rank>    the number of the error with which a flush fails
"""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlscale.checkpoint.saver import THREAD
from xlscale.config import ConfigError, load_config
from xlscale.config_sections import Config
from xlscale.training.loop import train
from xlscale.training.metrics import METRICS


def late(opens: Callable[..., Any], folder: Path, config: Config) -> Callable[..., Any]:
    """`opens` as the folder says."""
    last = config.training.stop_after or config.training.total_steps

    def to_wait(step: int) -> bool:
        done = (config.run_dir / METRICS).read_bytes().count(b"\n")
        return done < min(step + int((folder / "late").read_text()), last)

    def open_(path: Any, *arguments: Any, **options: Any) -> Any:
        step = re.search(r"step-(\d+)\.partial", str(path))
        if step and threading.current_thread().name == THREAD and (folder / "late").exists():
            while to_wait(int(step[1])):
                time.sleep(0.002)
        return opens(path, *arguments, **options)

    return open_


def slow(flush: Callable[[int], None], folder: Path, rank: str) -> Callable[[int], None]:
    """`flush` as the folder says."""

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name == THREAD:
            while (folder / f"hold-{rank}").exists():
                time.sleep(0.002)
            if (error := folder / f"fail-{rank}").exists():
                number = int(error.read_text())
                raise OSError(number, os.strerror(number))
        flush(descriptor)

    return fsync


if __name__ == "__main__":
    opens, folder = io.open, Path(sys.argv[1])
    os.fsync = slow(os.fsync, folder, os.environ["RANK"])  # type: ignore[assignment]
    for path in sys.argv[2:]:
        config = load_config(path)
        io.open = late(opens, folder, config)
        try:
            train(config)
        except ConfigError as error:
            sys.exit(f"refused: {error}")
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
