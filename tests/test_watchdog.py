"""xlscale/training/watchdog.py by itself; tests/distributed/test_signals.py has a run that hangs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

BEATS = """
import sys, time
from pathlib import Path
from xlscale.training.watchdog import Watchdog
with Watchdog(0.8, Path(sys.argv[1]), rank=0) as watchdog:
    for step in range(3):
        watchdog.beat("update", step)
        print(step, flush=True)
        for _ in range(5):  # one sleep would end with the suspension
            time.sleep(0.1)
    watchdog.rest()
    time.sleep(1.5)
print("done")
"""


def test_job_that_is_suspended_as_a_whole_has_not_hung(tmp_path: Path) -> None:
    """Nor has one that beats in time, nor one that is not watched any more."""
    process = subprocess.Popen([sys.executable, "-c", BEATS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and out.endswith("done\n")
    assert not (tmp_path / "stacks").exists()
