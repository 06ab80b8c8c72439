"""The report of data_pipelines: what is counted, in whatever parts, and the page that shows it."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines import report
from data_pipelines.__main__ import main
from data_pipelines.config import ReportConfig
from data_pipelines.config_load import load_recipe
from data_pipelines.page import write_page
from data_pipelines.steps.document import drop
from data_pipelines.steps.tally import Tally
from tests.test_pipeline_steps import archive, declarations, page, record
from tests.test_report import NASTY, Balanced, browsed
from xlscale.languages import LANGUAGES

OWN = """
from data_pipelines.steps.document import DocumentStep, drop

class DropShort(DocumentStep):
    name = "DropShort"
    reasons = {"own_short": "<b>shorter</b> than I want"}

    def process(self, document):
        if len(document.text) < 260:
            drop(document, "own_short")
"""
STEPS = '"read", "refuse", "extract", "clean", "identify", "filter", "{0}/own.py:DropShort", "exact", "near", '
RECIPE = (
    f'steps = [{STEPS}"paragraphs", "hold_out", "mask", "write", "verify"]\n'
    '[run]\noutput = "{0}/out"\n[read]\narchives = ["{0}/*.warc.gz"]\n[report]\ndropped_samples = 2\nkept_samples = 1\n'
)
MAIL = "Schreiben Sie an jane.doe@gmail.com, 8.8.184.216.\n"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a finished run with a step of the user's: pages of four languages, some twice, one nearly."""
    folder, records = tmp_path_factory.mktemp("report"), []
    for name in ("deu_1996", "fra", "rus", "jpn"):
        lines = [line for line in declarations()[name][0].split("\n") if line]
        pages = [MAIL + "\n".join(lines[i : i + 6]) for i in range(0, len(lines) - 6, 6)]
        records += [record(f"http://{name}.test/{i}", page(text).encode()) for i, text in enumerate(pages)]
        records.append(record(f"http://{name}.test/copy", page(pages[3]).encode()))
        records.append(record(f"http://{name}.test/nearly", page("\n".join(lines[18:31])).encode()))
        records.append(record(f"http://{name}.test/nearly2", page("\n".join(lines[18:30])).encode()))
    records.append(record('http://x.test/"><script>alert(1)</script>', b"no", status="404 Not Found"))
    archive(folder / "a.warc.gz", records[: len(records) // 2])
    archive(folder / "b.warc.gz", records[len(records) // 2 :])
    (folder / "own.py").write_text(OWN)
    (folder / "recipe.toml").write_text(RECIPE.format(folder))
    assert main([str(folder / "recipe.toml")]) == 0
    return folder


@pytest.fixture(scope="module")
def result(done) -> dict:
    """Its report.json."""
    return json.loads((done / "out/report.json").read_text("utf-8"))


def write_page_of(report: dict, folder: Path) -> str:
    """The page of a report."""
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    text = write_page(folder).read_text("utf-8")
    Balanced(text)
    return text


def test_every_step_has_what_the_one_before_left_and_the_last_one_leaves_what_was_kept(result):
    documents = result["total"]["read"]
    for row in result["steps"]:
        assert row["documents"] == documents, row
        documents -= row["dropped"]
    assert documents == result["total"]["training"] + result["total"]["heldout"]
    dropped = {row["step"]: row["dropped"] for row in result["steps"]}
    assert dropped["read"] == 1
    assert dropped["DropShort"] == result["dropped"]["own_short"] > 0
    assert min(dropped["exact"], dropped["near"], dropped["paragraphs"]) >= 3


def test_reasons_of_own_steps_stand_in_the_report_and_are_shown_from_there(result):
    assert result["reasons"]["own_short"] == {"step": "DropShort", "meaning": "<b>shorter</b> than I want"}
    changed = json.loads(json.dumps(result))
    changed["reasons"]["own_short"]["meaning"] = "told by the report"
    console = Console(record=True, width=120)
    report.show(changed, console)
    assert re.search(r"own_short +told by the report", console.export_text())


def test_reason_of_a_step_that_the_recipe_has_not_stands_in_the_funnel_all_the_same(done):
    recipe = load_recipe(done / "recipe.toml", ["steps=['read', 'identify', 'write', 'verify']"])
    rows = report.funnel(
        recipe, {"empty": 2, "not_ok": 1}, {"empty": {"step": "extract"}, "not_ok": {"step": "read"}}, 9
    )
    assert [(row["step"], row["documents"], row["dropped"]) for row in rows] == [
        ("read", 9, 1), ("extract", 8, 2), ("identify", 6, 0), ("write", 6, 0), ("verify", 6, 0)]  # fmt: skip


def test_histograms_count_each_document_that_has_a_text_once(result):
    for name in ("characters", "letters", "certainty"):
        measured = result["histograms"][name]
        for what in ("kept", "dropped"):
            assert all(len(bins) == len(measured["edges"]) + 1 for bins in measured[what].values())
        kept = {code: sum(bins) for code, bins in measured["kept"].items()}
        assert kept == {
            code: row["training"] + row["heldout"] for code, row in result["languages"].items() if row["training"]
        }
        dropped = sum(sum(bins) for bins in measured["dropped"].values())
        came_to_identify = result["total"]["dropped"] - result["dropped"]["not_ok"]
        before = ("read", "refuse", "extract", "clean", "identify")
        reasons = result["reasons"]
        if name == "certainty":
            assert dropped == came_to_identify
        elif name == "letters":
            assert dropped == sum(n for reason, n in result["dropped"].items() if reasons[reason]["step"] not in before)
        else:  # of some nothing was left without the paragraphs of others
            assert came_to_identify - result["dropped"]["repeated_paragraphs"] <= dropped < came_to_identify
    similar = result["histograms"]["similarity"]
    assert sum(map(sum, similar["dropped"].values())) == result["dropped"]["near_duplicate"]
    lowest = next(place for place, edge in enumerate(similar["edges"]) if edge > 0.75)
    assert not any(sum(bins[:lowest]) for bins in similar["dropped"].values())
    assert sum(sum(sum(b) for b in result["histograms"]["cluster_size"][what].values()) for what in ("kept", "dropped"))


def test_perplexity_is_shown_where_a_recipe_looks_at_it(result, tmp_path):
    tally = Tally(ReportConfig())
    for number in range(9):
        metadata = {"language": "de_DE", "archive": "a", "offset": 0, "perplexity": 100.0 * number + 30}
        tally.keep(Document(text="a", id=str(number), metadata=metadata), "training")
    measured = json.loads(json.dumps(tally.histograms()["perplexity"]))
    assert sum(measured["kept"]["de_DE"]) == 9
    assert "Perplexity" not in write_page_of(result, tmp_path)
    step = {"step": "perplexity", "documents": 9, "dropped": 0}
    changed = {**result, "steps": [*result["steps"], step]}
    changed["histograms"] = {**result["histograms"], "perplexity": measured}
    text = write_page_of(changed, tmp_path)
    assert "<figcaption>Perplexity</figcaption>" in text
    assert "from 512 to below 1k: kept 4" in text


@pytest.mark.parametrize(
    "characters, low", [(1, 0), (31, 0), (32, 32), (63, 32), (64, 64), (2**20, 2**20), (2**22, 2**20)]
)
def test_a_bin_begins_at_its_edge(characters, low):
    tally = Tally(ReportConfig())
    metadata = {"language": "de_DE", "archive": "a", "offset": 0}
    tally.keep(Document(text="a" * characters, id="0", metadata=metadata), "heldout")
    measured = tally.histograms()["characters"]
    assert (0, *measured["edges"])[measured["kept"]["de_DE"].index(1)] == low


def test_samples_are_few_and_without_addresses_though_their_documents_were_dropped_before_masking(done, result):
    samples = result["samples"]
    assert {code: len(rows) for code, rows in samples["kept"].items()} == dict.fromkeys(
        [code for code, row in result["languages"].items() if row["training"]], 1
    )
    for reason, rows in samples["dropped"].items():
        assert len(rows) == min(2, result["dropped"][reason])
        aside = [json.loads(line) for line in (done / f"out/dropped/{reason}.jsonl").read_text("utf-8").splitlines()]
        assert [row["id"] for row in aside] == [row["id"] for row in rows]
    text = (done / "out/report.json").read_text("utf-8")
    assert "jane.doe" not in text
    assert "8.8.184.216" not in text
    assert "email@example.com, 192.0.2.1" in text


def test_report_is_the_same_with_another_number_of_workers_but_for_the_seconds(done, result, tmp_path):
    config = str(done / "recipe.toml")
    assert main([config, "--set", f"run.output={tmp_path}/out", "--set", "run.workers=2"]) == 0
    other = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert other.pop("throughput") != result["throughput"]
    assert other == {name: value for name, value in result.items() if name != "throughput"}


def test_throughput_has_the_documents_that_came_to_each_step_and_adds_up(result):
    came = {row["step"]: row["documents"] for row in result["steps"]}
    timed = {row["step"]: row for row in result["throughput"]}
    assert {
        "read",
        "extract",
        "identify",
        "DropShort",
        "sign",
        "gather",
        "join",
        "decide",
        "write",
        "verify",
    } <= timed.keys()
    for name, row in timed.items():
        if name in came:
            assert row["documents"] == came[name]
        if row["seconds"] > 0.01:
            assert row["per_second"] == pytest.approx(row["documents"] / row["seconds"], rel=0.1)
    ours = ["sign", "collect", "gather", "join", "decide"]
    assert [name for name in timed if name != "load"] == [
        "read", "refuse", "extract", "clean", "identify", "filter", "DropShort", *ours, "mask", "write", "verify"
    ]  # fmt: skip


def test_page_is_well_formed_fetches_nothing_and_has_every_part(done):
    text = (done / "out/report.html").read_text("utf-8")
    tags = Balanced(text).tags
    heads = re.findall(r'<h2 id="([\w,]+)">', text)
    assert heads == ["funnel", "languages", "quality", "duplicates", "kept,", "dropped,", "throughput", "archives",
                     "tokenizer", "facts"]  # fmt: skip
    assert not [attrs for _, attrs in tags if {"src", "srcset"} & attrs.keys()]
    assert {attrs["href"] for _, attrs in tags if "href" in attrs} == {"data:,"}
    assert "default-src 'none'" in text
    assert "&lt;b&gt;shorter&lt;/b&gt; than I want" in text
    assert "<script>alert" not in text
    assert "<b>shorter" not in text
    assert text.count('class="mini"') == 4
    assert "None was trained" in text


def test_page_is_made_anew_when_it_is_missing_and_by_the_same_report_the_same(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    before = (tmp_path / "out/report.html").read_bytes()
    (tmp_path / "out/report.html").unlink()
    assert main([str(done / "recipe.toml"), "--set", f"run.output={tmp_path}/out"]) == 0
    assert (tmp_path / "out/report.html").read_bytes() == before


def test_page_escapes_whatever_an_archive_a_page_or_a_recipe_holds(result, tmp_path):
    def nasty(value):
        """The same with every string, and every key that is data, turned into markup."""
        if isinstance(value, dict):
            return {key: nasty(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [nasty(inner) for inner in value]
        return NASTY if isinstance(value, str) else value

    changed = {**result, "samples": nasty(result["samples"]), "recipe": nasty(result["recipe"])}
    changed["reasons"] = {name: {**row, "meaning": NASTY} for name, row in result["reasons"].items()}
    changed["archives"] = [{**row, "archive": NASTY, "bad": NASTY, "faults": [{"offset": 7, "fault": NASTY}] * 5}
                           for row in result["archives"] * 60]  # fmt: skip
    figures = {"characters": 9, "tokens_per_word": None, "tokens_per_character": 0.5, "unknown": 0.0}
    tokenizer = {"settings": {"kind": NASTY}, "pieces": 9, "characters": 9, "memory_gib": 1.0,
                 "fingerprint": result["fingerprint"], "languages": {NASTY: figures},
                 "against": {"folder": NASTY, "pieces": 8, "languages": {NASTY: figures}}}  # fmt: skip
    (tmp_path / "tokenizer-report.json").write_text(json.dumps(tokenizer), "utf-8")
    text = write_page_of(changed, tmp_path)
    assert "<img" not in text
    assert text.count("&lt;img") > 20
    assert "left out: &lt;img" in text
    assert "and 2 more" in text
    assert "Shown are 100, those with damage first." in text
    assert text.count("and 2 more") == 100


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_real_browser_shows_and_sorts_it_without_a_complaint(done, tmp_path):
    shutil.copy(done / "out/report.html", tmp_path)
    click = 'document.querySelectorAll("#languages ~ .card button")[0].click();'
    wide = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth;"
    shown = browsed(tmp_path / "report.html", tmp_path / "profile", click + wide)
    languages = shown.partition('id="languages"')[2].partition("</table>")[0]
    assert re.findall(r"<td>(\w\w_\w\w)</td>", languages) == ["ru_RU", "ja_XX", "fr_XX", "de_DE"]
    width, of = map(int, re.findall(r"<title>(\d+) of (\d+)", shown)[0])
    assert width <= of  # nothing sticks out at the side


@pytest.mark.parametrize("count", [0, 2, 100])
def test_page_serves_any_number_of_languages(result, tmp_path, count):
    codes = LANGUAGES[:count]
    row, one = result["languages"]["de_DE"], result["histograms"]["characters"]["kept"]["de_DE"]
    changed = json.loads(json.dumps(result))
    changed["languages"] = dict.fromkeys(codes, row)
    changed["histograms"]["characters"] |= {"kept": dict.fromkeys(codes, one), "dropped": {}}
    changed["samples"]["kept"] = dict.fromkeys(codes, result["samples"]["kept"]["de_DE"])
    text = write_page_of(changed, tmp_path)
    assert text.count('class="mini"') == count
    assert f"{count} of {count} languages" in text
    assert len(text) < 400_000


DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from(["", "de_DE", "fr_XX", "ja_XX"]),
        st.sampled_from(["training", "heldout", "empty", "code", "near_duplicate"]),
        st.text(max_size=40),
        st.floats(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 5), st.integers(0, 3), st.randoms(use_true_random=False))
def test_tallies_of_parts_add_up_to_the_tally_of_all(documents, parts, size, random):
    def counted(rows) -> Tally:
        tally = Tally(ReportConfig(dropped_samples=size, kept_samples=size))
        for number, (language, what, text, share) in rows:
            metadata = {"archive": "a", "offset": number, "url": "u", "certainty": share}
            document = Document(text=text, id=f"{number * 7919 % 97:03d}", metadata=metadata)
            if language or what in ("training", "heldout"):
                document.metadata["language"] = language or "de_DE"
            if what in ("training", "heldout"):
                tally.keep(document, what)
            else:
                drop(document, what)
                tally.drop(document)
        return tally

    def saved(tally: Tally, path: Path) -> dict:
        tally.save(path)
        return json.loads(path.read_text("utf-8"))

    rows = list(enumerate(documents))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tally.json"
        whole = saved(counted(rows), path)
        random.shuffle(rows)
        total = Tally(ReportConfig(dropped_samples=size, kept_samples=size))
        for part in range(parts):
            total.add(saved(counted(rows[part::parts]), path))
        assert saved(total, path) == whole
    assert all(len(rows) <= size for rows in [*whole["dropped"].values(), *whole["kept"].values()])
