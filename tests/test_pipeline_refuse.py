"""data_pipelines: pages that are not to be used: the blocklist, and what their owners say to robots."""

import gzip
import json

import pytest

from data_pipelines.__main__ import main
from data_pipelines.config import RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.steps.refuse import Blocklist, RefusePages, header_directives, page_directives
from tests.test_pipeline import recipe
from tests.test_pipeline_steps import archive, declarations, document, page, read, record

LIST = """
# what we were asked to leave out
example.org          # and all below it
https://www.prefix.test/private/
prefix.test/query?id=7
müller.test
[::1
"""


@pytest.mark.parametrize("packed", [False, True])
def test_blocklist_has_domains_and_prefixes(packed, tmp_path):
    path = tmp_path / "blocklist"
    path.write_bytes(gzip.compress(LIST.encode()) if packed else LIST.encode())
    blocklist = Blocklist(str(path))
    blocked = [
        "http://example.org",
        "https://EXAMPLE.org/a",
        "http://www.example.org/",
        "http://a.b.example.org:8080/x?y",
        "http://example.org.",
        "http://prefix.test/private/a",
        "http://a.prefix.test/private/",
        "http://prefix.test/query?id=77",
        "http://xn--mller-kva.test/",
        "http://www.müller.test/a",
        "http://user@example.org/",
    ]
    free = [
        "http://example.org.test/",
        "http://notexample.org/",
        "http://org/",
        "http://prefix.test/",
        "http://prefix.test/privat",
        "http://prefix.test/query?id=8",
        "http://a.test/?u=http://example.org/",
        "http://[::1",
        "nothing",
    ]
    assert [url for url in blocked if not blocklist.blocks(url)] == []
    assert [url for url in [*free, "", "http://"] if blocklist.blocks(url)] == []


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ('<meta name="robots" content="noindex, noarchive">', {"noindex", "noarchive"}),
        ("<META CONTENT = NOINDEX NAME = 'ROBOTS' />", {"noindex"}),
        ('<meta name="CCBot" content="nofollow">', {"nofollow"}),
        ('<meta name="robots" content="none">', {"none", "noindex", "nofollow"}),
        ('<meta name="googlebot" content="noindex">', set()),
        ('<meta name="description" content="noindex">', set()),
        ('<!-- <meta name="robots" content="noindex"> -->', set()),
        ('</head><body><meta name="robots" content="noindex">', set()),
        ("", set()),
    ],
)
def test_directives_of_a_page_are_those_for_all_robots_and_commoncrawls(head, found):
    assert page_directives(page("x", head).encode()) == found


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ("noarchive, NoIndex", {"noarchive", "noindex"}),
        ("googlebot: noindex, nofollow", set()),
        ("googlebot: noindex\nnoarchive", {"noarchive"}),
        ("googlebot: noindex, ccbot: nofollow, noarchive", {"nofollow", "noarchive"}),
        ("max-snippet:-1, max-image-preview:large, noindex", {"noindex"}),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noindex", {"noindex"}),
        ("", set()),
    ],
)
def test_directives_of_headers_are_those_for_all_robots_and_commoncrawls(headers, found):
    assert header_directives(headers) == found


def test_only_directives_that_the_recipe_names_drop_a_page(tmp_path):
    tag = '<meta name="robots" content="noarchive">'
    records = [
        record("http://a.test/1", page("x", tag).encode()),
        record(
            "http://a.test/2",
            page("x").encode(),
            "Content-Type: text/html\r\nX-Robots-Tag: a: b\r\nX-Robots-Tag: noindex",
        ),
        record("http://a.test/3", page("x").encode()),
    ]
    path = archive(tmp_path / "a.warc.gz", records)
    for robots, expected in (([], [None] * 3), (["noindex"], [None, "robots", None]),
                             (["noindex", "noarchive"], ["robots", "robots", None])):  # fmt: skip
        data = list(RefusePages("", robots).run(iter(read(path, tmp_path)[0])))
        assert [d.metadata.get("dropped") for d in data] == expected
        assert all("robots" not in d.metadata for d in data)


def test_text_that_came_without_a_page_is_blocked_by_its_address_alone(tmp_path):
    (tmp_path / "list").write_text("a.test\n")
    (found,) = RefusePages(str(tmp_path / "list"), ["noindex"]).run(iter([document("x", "http://a.test/b")]))
    assert found.metadata["dropped"] == "blocked"


def test_recipe_drops_blocked_pages_and_another_list_is_another_recipe(tmp_path):
    text = [line for line in declarations()["deu_1996"][0].split("\n") if line]
    records = [record(f"http://{'bad' if i < 30 else 'good'}.test/{i}", page("\n".join(text[i : i + 6])).encode())
               for i in range(0, len(text) - 6, 6)]  # fmt: skip
    archive(tmp_path / "a.warc.gz", records)
    (tmp_path / "list").write_text("bad.test\n")
    config = recipe(tmp_path, f"{tmp_path}/a.warc.gz", more=f"blocklist = '{tmp_path}/list'\n")
    assert main([str(config)]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["dropped"]["blocked"] == 5
    before = load_recipe(config).hash
    (tmp_path / "list").write_text("good.test\n")
    assert load_recipe(config).hash != before
    (tmp_path / "list").unlink()
    with pytest.raises(RecipeError, match=r"read\.blocklist = .*list' is no file"):
        load_recipe(config)


def test_misspelt_directive_is_refused(tmp_path):
    config = recipe(tmp_path, "a.warc.gz", more="robots = ['noindex', 'noarchiv']\n")
    with pytest.raises(RecipeError, match=r"read\.robots = .*noarchiv.* must be one of noarchive, noindex"):
        load_recipe(config)
