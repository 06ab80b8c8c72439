"""Uploads of Hub folders, in a process of its own each: nothing that a network or a library does reaches the training.

The token is the environment's HF_TOKEN. It is in no argument, no config and no file, and is struck out of what is told.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# torch is not imported here: the uploading process starts in a second.

TOKEN = "HF_TOKEN"
STALE = ["model*.safetensors", "model.safetensors.index.json", "adapters/*.safetensors"]
"""Of an earlier upload these go in the same commit: one whole file, if it stayed, would be loaded before new parts, and
adapters would be those of another trunk."""


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload a folder as one commit, making the repository where there is none; the commit's URL.

    ValueError, in one line and without the token, for whatever goes wrong.
    """
    token = _token()
    if not token:
        raise ValueError(f"{TOKEN} is not set; set it to a token that may write to {repository}")
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        told = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=STALE)
    except Exception as error:  # whatever a library or a network can fail with
        line = without_token(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
        raise ValueError(f"{folder} was not pushed to {repository}: {line}") from None
    return str(told.commit_url)


def without_token(text: str) -> str:
    """A text with the token struck out."""
    token = _token()
    return text.replace(token, "***") if token else text


def _token() -> str:
    # Without the end of line that a file of secrets gives: as a header it would be refused, and quoted in the refusal.
    return os.environ.get(TOKEN, "").strip()


@dataclass
class _Upload:
    step: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float


class Pusher:
    """Uploads one folder after the other behind the training; of those that wait only the newest is kept."""

    def __init__(self, repository: str, private: bool, hours: float):
        self.repository, self.private, self.seconds = repository, private, hours * 3600
        self._running: _Upload | None = None
        self._waiting: tuple[Path, int] | None = None

    def push(self, folder: Path, step: int) -> list[dict[str, Any]]:
        """Begin an upload, or let it wait for the one that goes on; what has ended since, as fields of an event."""
        told = self._poll()
        self._waiting = (folder, step)
        return told + self._start()

    def close(self) -> list[dict[str, Any]]:
        """Wait for what goes on and what waits, `hours` each at most; what came of them."""
        told = []
        while self._running or self._waiting:
            told += self._poll()
            told += self._start()
            time.sleep(0.05)
        return told

    def _start(self) -> list[dict[str, Any]]:
        if self._running or not self._waiting:
            return []
        (folder, step), self._waiting = self._waiting, None
        arguments = [str(folder), self.repository, str(int(self.private)), f"Weights after update {step}"]
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed once the process has ended
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "xlscale.checkpoint.push", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
        except OSError as error:
            output.close()
            return [{"ok": False, "of_step": step, "repository": self.repository, "problem": str(error)}]
        self._running = _Upload(step, process, output, time.monotonic())
        return []

    def _poll(self) -> list[dict[str, Any]]:
        """What has come of the running upload, once it has ended or its time is up."""
        if self._running is None:
            return []
        running, status = self._running, self._running.process.poll()
        seconds = time.monotonic() - running.started
        late = status is None and seconds > self.seconds
        if status is None and not late:
            return []
        if late:
            running.process.kill()
            running.process.wait()
        with running.output as output:
            output.seek(0)
            lines = without_token(output.read().decode(errors="replace")).strip().splitlines() or [""]
        self._running = None
        told = {"ok": status == 0, "of_step": running.step, "repository": self.repository, "seconds": seconds}
        if status == 0:
            return [told | {"url": lines[-1]}]
        problem = f"not done after {self.seconds:.0f} seconds" if late else lines[-1][:500] or f"exit status {status}"
        return [told | {"problem": problem}]


def main() -> int:
    """`python -m xlscale.checkpoint.push FOLDER REPOSITORY PRIVATE MESSAGE`: the last line says what came of it."""
    folder, repository, private, message = sys.argv[1:]
    try:
        sys.stdout.write(upload(Path(folder), repository, private == "1", message) + "\n")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
