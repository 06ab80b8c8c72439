"""Extraction by Trafilatura: the same sandbox, charsets and reasons as by Resiliparse."""

import pytest

from data_pipelines import config_load
from data_pipelines.config import ExtractConfig, RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.steps.extract import METHODS, ExtractText, extract
from tests.test_pipeline import recipe
from tests.test_pipeline_steps import declarations, document, page

pytest.importorskip("trafilatura")
MENU = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in ("Home", "About us", "Shop", "Contact"))


def with_menu(text: str) -> str:
    """A page with a menu above its text, and a form and a note below."""
    around = page(text).replace("<main>", f"<nav><ul>{MENU}</ul></nav><main>")
    return around.replace("</main>", "</main><footer>Copyright and all that.</footer><script>var x = 1;</script>")


@pytest.mark.parametrize("name", ["deu_1996", "rus", "jpn", "arb", "hin", "tha"])
def test_trafilatura_gives_the_text_of_a_page_and_not_what_stands_around_it(name):
    text = "\n".join(line for line in declarations()[name][0].split("\n") if len(line) > 100)
    found, charset = extract(with_menu(text).encode(), "", "trafilatura")
    assert charset == "utf-8"
    assert "About us" not in found
    assert "var x" not in found
    missing = [line for line in text.split("\n") if "".join(line.split()) not in "".join(found.split())]
    assert not missing


@pytest.mark.parametrize(("name", "charset"), [("fra", "latin-1"), ("jpn", "shift_jis"), ("cmn_hans", "gb18030")])
def test_charset_is_found_for_trafilatura_too(name, charset):
    text = declarations()[name][0][:4000].encode(charset, "ignore").decode(charset)
    found, _ = extract(page(text).encode(charset), "", "trafilatura")
    assert set(found.split()) <= set(text.split())
    assert len(found) > len(text) / 2
    declared = f'<?xml version="1.0" encoding="{charset}"?>{page(text)}'.encode(charset)
    assert extract(declared, "", "trafilatura")[0] == found


@pytest.mark.parametrize("method", METHODS)
def test_nasty_pages_cost_themselves_and_not_the_next_one(method):
    many = b"<p>A paragraph of a page that is very long indeed.</p>\n" * 100_000
    nested = b"<div>" * 60_000 + b"x" + b"</div>" * 60_000
    good = with_menu(declarations()["eng"][0][:3000]).encode()
    assert len({extract(good, "", name)[0] for name in METHODS}) == len(METHODS)
    step = ExtractText(ExtractConfig(method=method, timeout_seconds=1.0, memory_mib=256))
    pages = [good, many, nested, b"", b"\x00\xff\xfe<p", good]
    found = list(step.run(iter([document("", payload=payload, charset="") for payload in pages])))
    assert [d.metadata.get("dropped") for d in (found[0], found[3], found[5])] == [None, "empty", None]
    assert found[0].text == found[5].text == extract(good, "", method)[0]
    assert found[2].metadata["dropped"] in ("extract_timeout", "empty")
    if method == "trafilatura":
        assert found[1].metadata["dropped"] == "extract_timeout"


def test_missing_package_is_named_before_anything_runs(tmp_path, monkeypatch):
    path = recipe(tmp_path, "x", more="[extract]\nmethod = 'trafilatura'\n")
    assert load_recipe(path).extract.method == "trafilatura"
    monkeypatch.setattr(config_load, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"needs the package trafilatura: pip install 'xlscale\[trafilatura\]'"):
        load_recipe(path)
