"""xlscale/report.py: one page that needs nothing but itself, escapes what it shows, says what is missing."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from xlscale.charts import Series, line_chart, smooth, thin, ticks
from xlscale.config import load_config, to_toml
from xlscale.report import write_report
from xlscale.training.metrics import MetricsLog, read_metrics

REPO = Path(__file__).parents[1]
VOID = {"meta", "link", "line", "path", "circle", "rect", "br"}
NASTY = '<img src=x onerror="alert(1)">&'


class Balanced(HTMLParser):
    """Collects the tags of a page and refuses one that is closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def make_run(folder: Path, steps: int = 40, name: str = "demo") -> Path:
    """A run folder as the training loop leaves it, resumed once, with a corpus and predictions."""
    data = folder / "data"
    data.mkdir(parents=True)
    config = load_config(
        REPO / "configs" / "demo.toml",
        [
            f"run.name={name}",
            f"run.dir={folder}",
            f"data.shards={data / 'shards'}",
            "logging.wandb=disabled",
            "training.total_steps=300",
        ],
    )
    log = MetricsLog(config.run_dir, config, 0, is_main=True)
    log.event("start", 0, dp=2, tp=1, language_probabilities={"de_DE": 0.6, NASTY: 0.4})
    for step in range(1, steps + 1):
        if step == steps // 2:
            log.event("checkpoint", step, folder="x", held_seconds=0.125, written_seconds=2.5, bytes=1000)
            log.event("resume", step)
        record: dict[str, Any] = {"step": step, "learning_rate": 1e-3, "tokens": 4096, "skipped_updates": 1}
        record |= {"loss": None if step == 7 else 9.0 - step / 20, "grad_norm": 500.0 if step == 9 else 1.0}
        record |= {"tokens_per_second": 9000.0, "masked_accuracy": step / 100, "memory_gib": 0.9}
        record |= {"loss_per_language": {"de_DE": 8.0 - step / 20, NASTY: 8.0}, "dp": 2, "tp": 1}
        record |= {
            "tokens_per_language": {"de_DE": 3000, NASTY: 1096},
            "samples_per_language": {"de_DE": 11, NASTY: 5},
            "step_seconds": 0.5,
            "data_seconds": 0.1,
        }
        log.update(record)
    log.close()
    (config.run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    language = {
        "read": 9,
        "training": 5,
        "heldout": 1,
        "characters": {"training": 999},
        "dropped": {"near_duplicate": 3},
    }
    report = {"archives": [{}], "total": {"read": 18}, "dropped": {"near_duplicate": 6}}
    report["languages"] = {"de_DE": language, NASTY: {**language, "training": 0}}
    (data / "report.json").write_text(json.dumps(report), encoding="utf-8")
    example = {
        "language": NASTY,
        "text": f"{NASTY} <mask> ist.",
        "answer": "Tag",
        "top": [["\u2581Tag", 0.5], [NASTY, 0.1]],
    }
    predictions = {
        "model": NASTY,
        "accuracy": 0.21,
        "baseline_accuracy": 0.08,
        "per_language": {"de_DE": {"accuracy": 0.2, "baseline": 0.1, "n": 7}},
        "examples": [example],
    }
    (config.run_dir / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    return config.run_dir


def test_the_page_holds_every_part_and_is_well_formed(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    tags = Balanced(text).tags
    heads = re.findall(r'<h2 id="(\w+)">', text)
    assert heads == ["loss", "speed", "languages", "damaged", "corpus", "filled", "history", "facts"]
    assert sum(attrs.get("class") == "chart" for tag, attrs in tags if tag == "svg") == 7
    assert text.count('class="mini"') == 2
    for part in ("resumed at 20", "40 of 300 updates", "near duplicate", "21.0% right", "60.00%", "68.75%"):
        assert part in text
    assert "1 point lies above the top of the axis" in text


def with_records(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The run with every record changed."""
    records = read_metrics(run)
    for record in records:
        change(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return run


def row_of(text: str, name: str) -> str:
    """The text of the page's first table row that begins with a cell of `name`, its cells apart by bars."""
    row = re.findall(rf"<tr><td>{re.escape(name)}</td>(.*?)</tr>", text)[0]
    return re.sub(r"(<[^>]*>)+", "|", row)


def test_wanted_shares_are_those_in_force_and_realised_ones_all_samples(tmp_path: Path) -> None:
    """A language enters at step 30; a start that was killed had gone on there before, with other shares in mind."""

    def change(record: dict[str, Any]) -> None:
        record["samples_per_language"] = {"de_DE": 10, NASTY: 6} if record["step"] <= 30 else {"de_DE": 4, "sw_KE": 12}

    run = with_records(make_run(tmp_path), change)
    shares = [
        (0, {"de_DE": 0.75, NASTY: 0.25, "sw_KE": 0.0, "yo_NG": 0.0}),
        (25, {"de_DE": 1.0}),
        (20, {"de_DE": 0.5, NASTY: 0.5, "sw_KE": 0.0, "yo_NG": 0.0}),
        (30, {"de_DE": 0.25, NASTY: 0.0, "sw_KE": 0.74, "yo_NG": 0.01}),
    ]
    events = [
        {"time": 0.0, "step": step, "event": "phase", "language_probabilities": shares} for step, shares in shares
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    # 20 updates of 0.75, 10 of 0.5, 10 of 0.25; 340 of 640 samples.
    assert row_of(text, "de_DE").startswith("|120,000|56.25%|53.12%|")
    assert row_of(text, "sw_KE").startswith("|0|18.50%|18.75%|")
    assert row_of(text, "yo_NG").startswith("|0|0.25%|0.00%|")


def test_what_was_damaged_is_shown_by_shard_and_cause(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "No sample was replaced, and no document left out." in write_report(run).read_text(encoding="utf-8")

    def change(record: dict[str, Any]) -> None:
        if record["step"] in (3, 9):
            record["replaced"] = {
                f"{NASTY}.tar": {"missing": 2},
                "de_DE/de_DE-000001.tar": {"checksum": record["step"]},
            }

    with_records(run, change)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        event = {"time": 0.0, "step": 0, "event": "left_out", "documents_left_out": 7}
        event["left_out_of"] = {"de_DE/de_DE-000001.tar": {"checksum": 5}, "fr_XX/fr_XX-000000.tar": {"too long": 2}}
        file.write(json.dumps(event) + "\n")
    text = write_report(run).read_text(encoding="utf-8")
    Balanced(text)
    assert "16 samples were replaced" in text and "7 documents were left out" in text
    assert row_of(text, "de_DE/de_DE-000001.tar") == "|checksum|12|5|"
    assert row_of(text, "fr_XX/fr_XX-000000.tar") == "|too long|2|"
    assert "<img" not in text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    for _, attrs in Balanced(text).tags:
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attrs.keys()
        assert attrs.get("href", "data:,") == "data:,"
    assert "@import" not in text and "url(http" not in text
    assert "default-src 'none'" in text


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, name="a <b>&")).read_text(encoding="utf-8")
    assert "<img" not in text and "<b>&</h1>" not in text
    assert text.count("&lt;img") >= 6
    assert all("onerror" not in attrs for _, attrs in Balanced(text).tags)


def test_what_is_missing_is_said_and_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "predictions.json").unlink()
    (run / "config.toml").unlink()
    (run / "events.jsonl").write_text("", encoding="utf-8")
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    Balanced(text)
    for part in ("no data yet", "No report.json of data_pipelines", "no losses per language", "no events"):
        assert part in text
    assert 'id="filled"' not in text


def test_a_folder_that_is_no_run_is_refused_with_those_that_are(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"is no run folder.*there are {run}"):
        write_report(tmp_path / "dmeo")


def test_a_broken_file_of_the_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "predictions.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions\.json is not JSON"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    assert write_report(make_run(tmp_path, steps=3000)).stat().st_size < 400_000


def test_thinning_keeps_the_mean_and_the_order() -> None:
    points = [(float(step), None if step % 10 else step * 2.0) for step in range(0, 5000)]
    thinned = thin(points, 100)
    assert len(thinned) <= 100
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert sum(v for _, v in thinned if v is not None) / 100 == pytest.approx(4990, rel=0.01)


def test_the_mean_of_a_straight_line_is_the_line_and_a_gap_stays_a_gap() -> None:
    line = [(float(step), 3.0 * step) for step in range(50)]
    assert all(v == pytest.approx(3.0 * x) for x, v in smooth(line, 7)[3:-3])
    assert smooth([(1.0, 2.0), (2.0, None), (3.0, 4.0)], 3) == [(1.0, 2.0), (2.0, None), (3.0, 4.0)]


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (1e-9, 2e-9), (5, 5), (0, 0), (0.1, 123456)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 9


def test_a_gap_lifts_the_pen_and_a_lone_point_still_shows() -> None:
    svg = line_chart("x", [Series("x", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0)])], str)
    (drawn,) = re.findall(r'<path class="line" d="([^"]*)"', svg)
    assert drawn.count("M") == 2 and drawn.count("L") == 1 and drawn.endswith("h0.1")


def browsed(page: Path, profile: Path, script: str, scheme: str = "light") -> str:
    """The document as a browser has it after a script at its end; it must not complain of anything."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    flags += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom"]
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</script></body>", f"{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_shows_it_without_a_complaint(tmp_path: Path, scheme: str) -> None:
    # A click sorts the table of languages; what the page looks like afterwards is read from the DOM.
    click = 'document.querySelectorAll("#languages ~ .card button")[1].click();'
    probe = "document.title = getComputedStyle(document.body).backgroundColor;"
    shown = browsed(write_report(make_run(tmp_path)), tmp_path / "profile", click + probe, scheme)
    assert 'aria-sort="descending"' in shown
    background = re.search(r"<title>rgb\((\d+)", shown)
    assert background and (int(background[1]) < 60) == (scheme == "dark")
