"""Which archives a recipe reads: its patterns, URLs and listings made one list, checked before anything runs."""

import gzip
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_pipelines.config import ReadConfig, RecipeError
from data_pipelines.steps.corpora import kind_of, language_of_path
from data_pipelines.steps.document import write_whole
from data_pipelines.steps.fetch import read_remote
from xlscale.data.remote import Remote, is_url
from xlscale.data.shards import file_sha256

LISTINGS = (".paths", ".paths.gz")
SAVE_EVERY = 30.0  # seconds of reading archives for their digests that a killed command may lose


def find_archives(config: ReadConfig) -> list[str]:
    """The files and URLs that read.archives names, sorted; RecipeError lists all that is wrong with them."""
    found: set[str] = set()
    problems = []
    for pattern in config.archives:
        try:
            matches = list(_matches(pattern, config))
        except (OSError, ValueError) as error:
            problems.append(f"read.archives: {error}")
            continue
        if not matches:
            problems.append(f"read.archives: no file {pattern} (from {Path.cwd()}); give files or patterns of them")
        found.update(matches)
    if not config.archives:
        problems.append("read.archives = [] must name at least one file")
    archives = sorted(found)[: config.max_archives or None]
    problems += list(dict.fromkeys(problem for archive in archives for problem in _problems(archive, config)))
    if problems:
        raise RecipeError(problems)
    return archives


def described(archives: Sequence[str], cache: Path) -> list[dict[str, Any]]:
    """The archives as they stand in the report; size and digest of a remote one are added by who reads it.

    Digests are kept in the file `cache` by path, size and time of change: terabytes are not read again for them.
    """
    known: dict[str, list[Any]] = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    found: dict[str, list[Any]] = {}
    started = time.monotonic()
    for archive in archives:
        if not is_url(archive):
            path, stat = str(Path(archive).resolve()), Path(archive).stat()
            size_and_time = [stat.st_size, stat.st_mtime_ns]
            known_one = known.get(path, [])
            found[path] = known_one if known_one[:2] == size_and_time else [*size_and_time, file_sha256(Path(archive))]
            if time.monotonic() - started > SAVE_EVERY:
                write_whole(cache, json.dumps(known | found))
                started = time.monotonic()
    if found != known:
        write_whole(cache, json.dumps(found))
    rows = []
    for archive in archives:
        size, _, sha256 = (0, 0, "") if is_url(archive) else found[str(Path(archive).resolve())]
        rows.append({"archive": archive, "bytes": size, "sha256": sha256})
    return rows


def _matches(pattern: str, config: ReadConfig) -> Iterator[str]:
    for path in _local_or_remote(pattern):
        if not path.endswith(LISTINGS):
            yield path
            continue
        content = read_remote(path, config.attempts) if is_url(path) else Path(path).read_bytes()
        try:
            content = gzip.decompress(content) if path.endswith(".gz") else content
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: is no whole gzip file ({error}); fetch it anew") from None
        for line in content.decode("utf-8").split():
            yield line if is_url(line) else f"{config.listing_base.rstrip('/')}/{line.lstrip('/')}"


def _local_or_remote(pattern: str) -> Iterator[str]:
    """The files that a pattern names."""
    if is_url(pattern):
        system, path = Remote().system(pattern)
        # A ? begins a query, and web servers list nothing.
        if "*" in path and not pattern.startswith("http"):
            yield from (system.unstrip_protocol(match) for match in system.glob(path))
        else:
            yield pattern
        return
    local = Path(pattern)
    matches = [local] if local.is_file() else Path(local.anchor).glob(str(local.relative_to(local.anchor)))
    yield from (str(match) for match in matches if match.is_file())


def _problems(archive: str, config: ReadConfig) -> Iterator[str]:
    """What stands in the way of reading a file."""
    if not is_url(archive) and not Path(archive).is_file():
        yield f"read.archives: {archive} does not exist; mend the listing or read.listing_base"
        return
    try:
        kind = kind_of(archive, config)
    except ValueError as error:
        yield f"read.archives: {error}"
        return
    parquet = kind == "parquet" or archive.lower().endswith(".parquet")
    for package, needed in (("pyarrow", parquet), ("lz4", archive.lower().endswith(".lz4"))):
        if needed and not find_spec(package):
            extra = "parquet" if package == "pyarrow" else package
            yield f"read.archives: {extra} files need the package {package}: pip install 'xlscale[{extra}]'"
    if config.language_from == "field" and kind in ("warc", "index", "txt"):
        yield f"read.language_from = 'field': {archive} is {kind} and has no fields; use 'text' or 'path'"
    if config.language_from == "path" and not language_of_path(archive):
        yield (f"read.language_from = 'path': neither name nor folder of {archive} is a language of XLM-R; "
               f"name it like de.jsonl.gz or deu_Latn/, or use 'text'")  # fmt: skip
