"""Fetch: a remote archive comes whole to the work folder for as long as its task reads it."""

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xlscale.data.remote import BLOCK, FetchError, Remote, is_url

WAIT = 1.0  # seconds before the second attempt, twice as many before each further one, at most a minute

T = TypeVar("T")


class _NoRangesError(PermissionError):
    """A server's way, so that asking again cannot help."""


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


def read_ranges(places: Sequence[tuple[str, int, int]], attempts: int) -> list[bytes | str]:
    """The bytes of (file or URL, first byte, bytes), all asked for at once; of what is not there, that it is not.

    FetchError where the network fails, or a server knows no ranges.
    """
    got: dict[int, bytes | str] = {}

    def ask() -> None:
        failed = None
        by_system = defaultdict[Any, list[tuple[int, str]]](list)
        for number, (url, _, _) in enumerate(places):
            if number not in got:
                system, path = Remote().system(url)
                by_system[system].append((number, path))
        for system, asked in by_system.items():
            starts = [places[number][1] for number, _ in asked]
            ends = [places[number][1] + places[number][2] for number, _ in asked]
            answers = system.cat_ranges([path for _, path in asked], starts, ends, on_error="return")
            for (number, _), answer in zip(asked, answers, strict=True):
                url, _, length = places[number]
                if isinstance(answer, FileNotFoundError) or getattr(answer, "status", 0) == 416:
                    got[number] = "the file is not there, or ends before it"
                elif isinstance(answer, Exception):
                    failed = answer
                elif len(answer) > length:
                    raise _NoRangesError(f"{url}: the server sends more than the {length} bytes that are asked for; "
                                         f"read whole archives, or from a server that knows ranges")  # fmt: skip
                else:
                    got[number] = answer
        if failed:
            raise failed

    if places:
        retry(ask, places[0][0], attempts)
    return [got[number] for number in range(len(places))]


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
