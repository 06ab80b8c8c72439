"""data_pipelines: archives on servers and in CommonCrawl's listings, by a real server on loopback."""

import gzip
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipelines.__main__ import main
from data_pipelines.archives import find_archives
from data_pipelines.config import ReadConfig, RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.recipe import described, key_of
from data_pipelines.steps import fetch
from data_pipelines.steps.fetch import FetchError, at_hand, retry
from data_pipelines.steps.read import ReadArchives
from tests.test_pipeline import recipe
from tests.test_pipeline import small as small  # the fixture
from tests.test_pipeline_steps import PAGES, archive


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; fails as it is told to."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.failures:
            failure = self.server.failures.pop(0)
            if isinstance(failure, int):
                self.send_error(failure)
                return
            content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            if failure == "cut":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(its address, the server): it serves tmp_path/www; waits between attempts are short."""
    (tmp_path / "www").mkdir()
    monkeypatch.setattr(fetch, "WAIT", 0.01)

    def handler(*args: Any) -> Handler:
        return Handler(*args, directory=str(tmp_path / "www"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.failures, running.asked = [], []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", running
        running.shutdown()


@pytest.mark.parametrize("failures", [[], [503, 500, 429], ["cut", "short"]])
def test_remote_archive_is_read_whole_though_the_network_fails(failures, server, tmp_path):
    address, running = server
    path = archive(tmp_path / "www/a.warc.gz", PAGES)
    running.failures += failures
    config = ReadConfig(archives=[])
    step = ReadArchives([f"{address}/a.warc.gz"], config, tmp_path / "found", tmp_path / "progress")
    documents = list(step.run())
    assert [d.metadata["url"] for d in documents] == [f"http://a.test/{i}" for i in range(10)]
    assert {d.metadata["archive"] for d in documents} == {"a.warc.gz"}
    (row,) = [json.loads(line) for line in (tmp_path / "found/00000.jsonl").open()]
    assert (row["bytes"], len(row["sha256"]), row["faults"]) == (path.stat().st_size, 64, [])
    assert len(running.asked) == 1 + len(failures)
    assert list((tmp_path / "found/fetched").iterdir()) == []  # nothing is left


@pytest.mark.parametrize(("failure", "attempts"), [(404, 1), (403, 1), (503, 3), ("short", 3)])
def test_what_cannot_be_had_is_said_and_what_is_refused_not_asked_for_again(failure, attempts, server, tmp_path):
    address, running = server
    archive(tmp_path / "www/a.warc.gz", PAGES)
    running.failures += [failure] * 10
    with (
        pytest.raises(FetchError, match=rf"a\.warc\.gz: .* \(attempt {attempts} of read\.attempts = 3\); check"),
        at_hand(f"{address}/a.warc.gz", tmp_path / "fetched", 3),
    ):
        pass
    assert len(running.asked) == attempts
    assert not [path for path in (tmp_path / "fetched").iterdir() if not path.name.startswith(".")]


def test_archive_fetched_by_a_task_that_was_killed_is_not_fetched_again(server, tmp_path):
    address, running = server
    archive(tmp_path / "www/a.warc.gz", PAGES)
    folder = tmp_path / "fetched"
    with pytest.raises(KeyboardInterrupt), at_hand(f"{address}/a.warc.gz", folder, 1):
        raise KeyboardInterrupt
    with at_hand(f"{address}/a.warc.gz", folder, 1) as path:
        assert path.read_bytes() == (tmp_path / "www/a.warc.gz").read_bytes()
    assert len(running.asked) == 1
    assert not path.exists()


def test_full_disk_is_no_network_that_fails():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        retry(full, "x", 5)
    assert not isinstance(caught.value, FetchError)


def test_listing_of_commoncrawl_is_the_same_corpus_as_its_files(server, small, tmp_path):
    address, running = server
    for name in ("a", "b"):
        (tmp_path / f"www/crawl-data/{name}.warc.gz").parent.mkdir(exist_ok=True)
        (tmp_path / f"www/crawl-data/{name}.warc.gz").write_bytes((small / f"{name}.warc.gz").read_bytes())
    listing = gzip.compress(b"crawl-data/a.warc.gz\ncrawl-data/b.warc.gz\n")
    (tmp_path / "www/warc.paths.gz").write_bytes(listing)
    assert main([str(recipe(tmp_path, f"{small}/*.warc.gz", "local"))]) == 0
    running.failures.append(503)
    config = recipe(tmp_path, f"{address}/warc.paths.gz", "remote", more=f"listing_base = '{address}'\n")
    assert main([str(config), "--set", "run.workers=2"]) == 0
    local, remote = (
        # Not the manifest: it names what the shards were made of.
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")
         if path.is_file() and path.suffix in (".tar", ".jsonl") and path.name != "manifest.jsonl"}
        for name in ("local", "remote")
    )  # fmt: skip
    assert local == remote
    assert len(local) > 10
    reports = [json.loads((tmp_path / name / "report.json").read_text())["archives"] for name in ("local", "remote")]
    assert [(row["bytes"], row["sha256"]) for row in reports[0]] == [
        (row["bytes"], row["sha256"]) for row in reports[1]
    ]
    asked = len(running.asked)
    assert main([str(config)]) == 0  # up to date: the listing is read, no archive
    assert running.asked[asked:] == ["/warc.paths.gz"]


def test_listings_patterns_and_addresses_make_one_list(tmp_path):
    base = "memory:///crawl"
    system = fsspec.filesystem("memory")
    for name in ("x1", "x2", "y"):
        system.pipe(f"/crawl/{name}.warc.gz", b"x")
    (tmp_path / "wet.paths").write_text("/b.warc.wet.gz\na.warc.wet.gz\nhttps://elsewhere.test/c.warc.wet.gz\n")
    config = ReadConfig(archives=[f"{base}/x*.warc.gz", f"{tmp_path}/wet.paths"], listing_base=f"{tmp_path}/mirror")
    mirror = [f"{tmp_path}/mirror/{name}.warc.wet.gz" for name in "ab"]
    with pytest.raises(
        RecipeError, match=r"mirror/a\.warc\.wet\.gz does not exist; mend the listing or read\.listing_base"
    ):
        find_archives(config)
    (tmp_path / "mirror").mkdir()
    for path in mirror:
        Path(path).write_bytes(b"x")
    every = [*mirror, "https://elsewhere.test/c.warc.wet.gz", f"{base}/x1.warc.gz", f"{base}/x2.warc.gz"]
    assert find_archives(config) == every
    settings = {"listing_base": f"{tmp_path}/mirror", "max_archives": 3}
    assert find_archives(ReadConfig(archives=config.archives, **settings)) == every[:3]


@pytest.mark.parametrize(
    ("archives", "expected"),
    [
        ("nosuch://a/b.warc.gz", "nosuch://a/b.warc.gz: cannot be read: Protocol not known: nosuch"),
        ("http://127.0.0.1:1/warc.paths.gz", "(attempt 1 of read.attempts = 1); check the address"),
    ],
)
def test_addresses_that_cannot_be_read_are_said_before_anything_runs(archives, expected, tmp_path, capsys):
    assert main([str(recipe(tmp_path, archives, more="attempts = 1\n"))]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert expected in error


@pytest.mark.parametrize("content", [b"plain", gzip.compress(b"a.warc.gz\n" * 100)[:-12], b""])
def test_listing_that_is_damaged_is_said(content, tmp_path):
    (tmp_path / "warc.paths.gz").write_bytes(content)
    with pytest.raises(RecipeError, match=r"warc\.paths\.gz(: is no whole gzip file .*; fetch it anew| )"):
        find_archives(ReadConfig(archives=[f"{tmp_path}/warc.paths.gz"]))


def test_archives_are_known_by_content_and_remote_ones_by_address(tmp_path):
    config = load_recipe(recipe(tmp_path, "x"))
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.warc.gz").write_bytes(b"same")
    cache = tmp_path / "digests.json"
    local = [key_of(config, described([str(tmp_path / name / "x.warc.gz")], cache)) for name in "ab"]
    remote = [key_of(config, described([f"http://{name}.test/x.warc.gz"], cache)) for name in "ab"]
    assert local[0] == local[1]
    assert len({*local, *remote}) == 3
