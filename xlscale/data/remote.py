"""Reading by URL: any file system that fsspec knows, tried again while it fails as networks do."""

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

log = logging.getLogger(__name__)

BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of our own disk: no network can help

T = TypeVar("T")


class FetchError(OSError):
    """A remote file that cannot be had; `cause` is "missing", "network", "checksum" or "cut short"."""

    def __init__(self, cause: str, message: str):
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self) -> str:
        return self.message


def is_url(base: str | Path) -> bool:
    """Whether fsspec has to read it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(base)) is not None


class Remote:
    """Opens URLs; what fails is tried `attempts` times, by default 6 in about half a minute.

    The waits are `wait_seconds` times 1, 2, 4, ... (at most 60 s each), times 0.5 to 1.5 by chance, so that a
    thousand readers do not come back at once. A server that says nothing for `stall_seconds` has failed. What
    is not there, or may not be read, is not asked for again.
    """

    def __init__(self, attempts: int = 6, wait_seconds: float = 1.0, stall_seconds: float = 60.0):
        self.attempts, self.wait_seconds, self.stall_seconds = attempts, wait_seconds, stall_seconds

    def retry(self, what: Callable[[], T], url: str) -> T:
        """what(), tried again while it fails; FetchError in the end."""
        for attempt in range(1, self.attempts + 1):
            try:
                return what()
            except FileNotFoundError:
                raise FetchError("missing", f"{url}: is not there; bring it back, or check the URL") from None
            except Exception as error:  # every file system of fsspec has errors of its own
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                cause = error.cause if isinstance(error, FetchError) else "network"
                shown = str(error) or type(error).__name__
                if attempt == self.attempts or _is_final(error):
                    break
                wait = min(self.wait_seconds * 2 ** (attempt - 1), 60.0) * random.uniform(0.5, 1.5)
                log.warning("%s: %s; attempt %d of %d in %.1f s", url, shown, attempt + 1, self.attempts, wait)
                time.sleep(wait)
        times = "once" if attempt == 1 else f"{attempt} times"
        raise FetchError(cause, f"{url}: failed {times}, at last: {shown}; check the server and the network")

    def open(self, url: str, size: int | None = None) -> IO[bytes]:
        """A file to be read from its beginning to its end; of known size it takes one request less."""
        system, path = self.system(url)
        if not url.startswith("http"):
            return system.open(path, "rb", block_size=16 * BLOCK)
        # One request for all of it: many web servers know no ranges.
        return system.open(path, "rb", block_size=0, **({"size": size} if size else {}))

    def read(self, url: str) -> bytes:
        """A small file; FetchError if it cannot be had."""

        def read() -> bytes:
            with self.open(url) as file:
                return b"".join(iter(lambda: file.read(BLOCK), b""))

        return self.retry(read, url)

    def exists(self, url: str) -> bool:
        """Whether a file is there; FetchError if that cannot be said."""

        def info() -> None:
            system, path = self.system(url)
            system.invalidate_cache()
            system.info(path)

        try:
            self.retry(info, url)
        except FetchError as error:
            if error.cause != "missing":
                raise
            return False
        return True

    def listing(self, url: str) -> list[str]:
        """The paths right below a folder, none if it is not there; FetchError if that cannot be said."""

        def ls() -> list[str]:
            system, path = self.system(url)
            system.invalidate_cache()
            return system.ls(path, detail=False)

        try:
            return self.retry(ls, url)
        except FetchError as error:
            if error.cause != "missing":
                raise
            return []

    def system(self, url: str) -> tuple[Any, str]:
        """fsspec's file system of a URL, and the path there; ValueError if the package for it is not installed."""
        import fsspec  # takes 50 ms, and who reads local shards needs none of it

        options: dict[str, Any] = {}
        try:
            if url.startswith("http"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(
                    total=None, sock_connect=self.stall_seconds, sock_read=self.stall_seconds
                )
                # Not unpacked on the way: size and digest are those of the file.
                options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
            # Not kept: an instance must not cross a fork, and fsspec knows its own.
            return fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:  # it names the package: s3fs, gcsfs, aiohttp, ...
            raise ValueError(f"{url}: cannot be read: {error}; install it, as in pip install 'fsspec[s3]'") from None


def _is_final(error: Exception) -> bool:
    """Whether a server has refused, so that asking again cannot help."""
    status = getattr(error, "status", 0)
    return isinstance(error, PermissionError) or (400 <= status < 500 and status not in (408, 425, 429))
