"""Fetch: a remote archive comes whole to the work folder for as long as its task reads it."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from xlscale.data.remote import BLOCK, FetchError, Remote, is_url

WAIT = 1.0  # seconds before the second attempt, twice as many before each further one, at most a minute

T = TypeVar("T")


def read_remote(url: str, attempts: int) -> bytes:
    """A small file, such as a listing; FetchError if it cannot be had."""
    return retry(lambda: b"".join(_blocks(url)), url, attempts)


@contextlib.contextmanager
def at_hand(archive: str, folder: Path, attempts: int) -> Iterator[Path]:
    """The archive as a local file: itself, or a copy in `folder` that is whole and goes when it has been read."""
    if not is_url(archive):
        yield Path(archive)
        return
    path = folder / f"{hashlib.sha256(archive.encode()).hexdigest()[:24]}-{Path(archive).name[-80:]}"
    if not path.exists():  # else of this task, killed while it was reading
        folder.mkdir(parents=True, exist_ok=True)
        retry(lambda: _download(archive, path), archive, attempts)
    yield path
    path.unlink()


def _download(url: str, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for block in _blocks(url):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _blocks(url: str) -> Iterator[bytes]:
    """The bytes of a remote file; FetchError at the end if they are not as many as its size."""
    system, path = Remote().system(url)
    system.invalidate_cache()
    size = system.info(path).get("size")
    got = 0
    with Remote().open(url) as file:
        while block := file.read(BLOCK):
            got += len(block)
            yield block
    if size is not None and got != size:
        raise FetchError("cut short", f"{got} of {size} bytes came")


def retry(what: Callable[[], T], url: str, attempts: int) -> T:
    """what(), again while it fails as networks do; FetchError in the end, at once for what the server refuses."""
    tried = 0

    def once() -> T:
        nonlocal tried
        tried += 1
        return what()

    try:
        return Remote(attempts, WAIT).retry(once, url)
    except FetchError as error:
        raise FetchError(
            error.cause,
            f"{error} (attempt {tried} of read.attempts = {attempts}); check the address too, then run the same "
            f"command again: finished archives are not read again",
        ) from None
