"""data_pipelines: results of CommonCrawl's index are read as exactly the records that they name."""

import csv
import gzip
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.__main__ import main
from data_pipelines.config import ReadConfig
from data_pipelines.steps import fetch
from data_pipelines.steps.fetch import FetchError
from data_pipelines.steps.read import ReadArchives
from tests.test_pipeline import recipe
from tests.test_pipeline import small as small  # the fixture
from tests.test_pipeline_steps import PAGES, archive
from tests.test_pipeline_steps import read as read_whole
from xlscale.data.shards import Corpus

Row = tuple[str, int, int]  # file, offset, length


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder by ranges; fails as it is told to, and counts the bytes that it sends."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.failures and (status := self.server.failures.pop(0)) != 200:
            self.send_error(status)
            return
        path, asked = Path(self.directory) / self.path.lstrip("/"), self.headers["Range"]
        if not path.exists():
            self.send_error(404)
            return
        content = path.read_bytes()
        if asked and self.server.ranges:
            first, last = (int(part) for part in re.findall(r"\d+", asked))
            if first >= len(content):
                self.send_error(416)
                return
            content = content[first : last + 1]
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.server.sent[self.path] += len(content)
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """(its address, the server): it serves tmp_path/www by ranges."""
    (tmp_path / "www/crawl").mkdir(parents=True)
    monkeypatch.setattr(fetch, "WAIT", 0.01)

    def handler(*args: Any) -> Handler:
        return Handler(*args, directory=str(tmp_path / "www"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.failures, running.ranges, running.sent = [], True, Counter()
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", running
        running.shutdown()


def places(path: Path, name: str) -> list[Row]:
    """Where the records of a .warc.gz of these pages lie."""
    sizes = [len(gzip.compress(one, mtime=0)) for one in PAGES]
    assert sum(sizes) == path.stat().st_size
    return [(name, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def cdxj(path: Path, rows: list[Row]) -> Path:
    lines = (json.dumps({"filename": file, "offset": str(at), "length": str(size)}) for file, at, size in rows)
    path.write_text("".join(f"test,a)/ 20240101000000 {line}\n" for line in lines))
    return path


def server_json(path: Path, rows: list[Row]) -> Path:
    names = ("filename", "offset", "length")
    path.write_text("".join(json.dumps(dict(zip(names, map(str, row), strict=True))) + "\n" for row in rows))
    return path


def cdx(path: Path, rows: list[Row]) -> Path:
    lines = (f"test,a)/ 20240101 http://a.test/ text/html 200 ABC - - {size} {at} {file}\n" for file, at, size in rows)
    path.write_bytes(gzip.compress((" CDX N b a m s k r M S V g\n" + "".join(lines)).encode()))
    return path


COLUMNS = ("warc_filename", "warc_record_offset", "warc_record_length")


def athena(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL)
        table.writerow(("url", *COLUMNS))
        table.writerows((f"http://a.test/{at}", *row) for at, row in enumerate(rows))
    return path


def columnar(path: Path, rows: list[Row]) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = [{"url": "x", **dict(zip(COLUMNS, row, strict=True))} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


def read(path: Path, tmp_path: Path, base: str, **settings: Any) -> tuple[list[Any], Any]:
    """The documents that an index names, and what was reported of it."""
    config = ReadConfig(archives=[], listing_base=base, **{"format": "index", "attempts": 3, **settings})
    step = ReadArchives([str(path)], config, tmp_path / "found", tmp_path / "progress")
    return list(step.run()), json.loads((tmp_path / "found/00000.jsonl").read_text())


@pytest.mark.parametrize(
    ("write", "name"),
    [(cdxj, "a.cdxj"), (cdx, "a.cdx.gz"), (server_json, "a.jsonl"), (athena, "a.csv"), (columnar, "a.parquet")],
)
@pytest.mark.parametrize("remote", [False, True])
def test_rows_of_any_index_are_the_same_documents_as_in_their_archive(remote, write, name, server, tmp_path):
    address, running = server
    path = archive(tmp_path / "www/crawl/a.warc.gz", PAGES)
    rows = places(path, "crawl/a.warc.gz")
    chosen = [rows[7], rows[2], rows[4]]
    index = write(tmp_path / name, chosen)
    documents, found = read(index, tmp_path, address if remote else str(tmp_path / "www"), max_faults=0)
    whole = {d.metadata["offset"]: d for d in read_whole(path, tmp_path)[0]}
    assert documents == [whole[offset] for _, offset, _ in sorted(chosen)]
    assert found["records"] == {"response": 3}
    assert running.sent.total() == (sum(size for _, _, size in chosen) if remote else 0)


def test_records_come_though_the_network_fails_and_are_not_read_twice(server, tmp_path):
    address, running = server
    rows = places(archive(tmp_path / "www/crawl/a.warc.gz", PAGES), "crawl/a.warc.gz")
    running.failures += [503, 200, 200, 200, 500, 200, 429]
    documents, found = read(cdxj(tmp_path / "a.cdxj", rows), tmp_path, address, max_faults=0, attempts=6)
    assert (len(documents), found["faults"]) == (10, [])
    assert running.sent["/crawl/a.warc.gz"] == sum(size for _, _, size in rows)
    running.failures += [503] * 100
    with pytest.raises(FetchError, match=r"503.*attempt 3 of read\.attempts = 3"):
        read(tmp_path / "a.cdxj", tmp_path, address)


def test_rows_that_name_no_record_are_counted_as_damage_and_the_others_read(server, tmp_path):
    address, _ = server
    path = archive(tmp_path / "www/crawl/a.warc.gz", PAGES)
    rows = places(path, "crawl/a.warc.gz")
    file, start, size = rows[3]
    wrong = [(file, start + 1, size), (file, start, size - 5), (file, 10**9, 5), ("crawl/b.warc.gz", 0, 9)]
    index = cdxj(tmp_path / "a.cdxj", [rows[0], *wrong, rows[1]])
    index.write_text(index.read_text() + 'x 1 {"filename": "a"}\nx 1 {"broken\n!meta 0 {}\n\nodd line\n')
    for base in (address, str(tmp_path / "www")):
        documents, found = read(index, tmp_path, base, max_faults=7)
        assert [d.metadata["url"][-1] for d in documents] == ["0", "1"]
        faults = [fault["fault"] for fault in found["faults"]]
        assert len(faults) == 7
        assert sum("does not say where a record lies" in fault for fault in faults) == 3
        assert sum("the archive ends inside a record" in fault for fault in faults) == 1
        assert sum(f"a.warc.gz, byte {start + 1}: " in fault for fault in faults) == 1
    index.write_bytes(gzip.compress(index.read_bytes())[:-20])  # cut short
    assert "what follows in the index is lost" in str(read(index, tmp_path, base, max_faults=20)[1]["faults"])


def test_server_that_knows_no_ranges_is_named_after_one_request(server, tmp_path):
    address, running = server
    path = archive(tmp_path / "www/crawl/a.warc.gz", PAGES)
    running.ranges = False
    index = cdxj(tmp_path / "a.cdxj", places(path, "crawl/a.warc.gz"))
    with pytest.raises(FetchError, match=r"sends more than the .* read whole archives"):
        read(index, tmp_path, address)
    assert running.sent["/crawl/a.warc.gz"] == path.stat().st_size


def test_recipe_on_an_index_of_all_records_makes_the_shards_of_the_archives(small, tmp_path):
    rows = []
    for path in sorted(small.glob("*.warc.gz")):
        whole, _ = read_whole(path, tmp_path, max_page_bytes=1 << 23)
        starts = [d.metadata["offset"] for d in whole]
        ends = [*starts[1:], path.stat().st_size]
        rows += [(path.name, start, end - start) for start, end in zip(starts, ends, strict=True)]
    index = cdxj(tmp_path / "result.cdxj", rows)
    assert main([str(recipe(tmp_path, f"{small}/*.warc.gz", "whole"))]) == 0
    assert main([str(recipe(tmp_path, str(index), "chosen", more=f"listing_base = '{small}'\n"))]) == 0
    shards = [
        {language: list(corpus.read(language)) for language in corpus.languages}
        for corpus in (Corpus.open(tmp_path / name / "shards") for name in ("whole", "chosen"))
    ]
    assert shards[0] == shards[1]
    assert len(shards[0]) == 5
