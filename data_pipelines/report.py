"""The report: what was read, kept and dropped, and why, as JSON and as tables."""

import importlib.metadata
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_pipelines.config import Recipe
from data_pipelines.config_rules import CORPUS_STEPS
from data_pipelines.steps.document import REASONS, write_lines
from data_pipelines.steps.tally import CLEANED, Row, Tally
from xlscale.data.shards import Corpus

UNKNOWN = "(not known)"  # the language of pages that were dropped before it was identified
KEPT = ("training", "heldout")
EXCERPT = 400  # characters of a sample that stand in the report
BETWEEN = ("sign", "collect", "gather", "join", "decide", "load")  # our own steps, before the first of CORPUS_STEPS
PACKAGES = ("xlscale", "datatrove", "fastwarc", "resiliparse", "py3langid", "pycld2", "rensa", "ftfy")
PLACE = ("run", "slurm", "ray")  # sections of a recipe that say where it runs
LOOK: Any = {
    "box": SIMPLE_HEAD,
    "padding": 0,
    "pad_edge": False,
    "title_justify": "left",
    "title_style": "bold",
    "header_style": "bold",
}
COLUMNS = (
    "read",
    "filtered",
    "exact\ndup.",
    "near\ndup.",
    "small\nlang.",
    "held\nout",
    "training",
    "training\ncharacters",
)


def build(recipe: Recipe, work: Path, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds up what the tasks have counted and writes the dropped samples to work/dropped/."""
    tally, read = Tally(recipe.report), 0
    for path in sorted([*work.glob("documents/[0-9]*/tally.json"), *work.glob("tallies/*.json")]):
        body = _json(path)
        tally.add(body)
        read += body.get("read", 0)
    languages = {language or UNKNOWN: counts for language, counts in sorted(tally.counts.items())}
    for reason, rows in tally.dropped.items():
        if rows:
            write_lines(work / "dropped" / f"{reason}.jsonl", rows)
    everything = sum(languages.values(), Counter())
    assert read == everything.total(), f"{read} documents were read, {everything.total()} are accounted for"
    shards = work / "shards"
    found = [json.loads(line) for path in sorted(work.glob("archives/*.jsonl")) for line in path.open("rb")]
    records = {row["archive"]: row for row in found}
    reasons = {
        reason: {"step": step, "meaning": meaning}
        for step, meant in REASONS.items()
        for reason, meaning in meant.items()
        if everything[reason]
    }
    steps = funnel(recipe, {reason: everything[reason] for reason in reasons}, reasons, read)
    return {
        "archives": [row | records[row["archive"]] for row in inputs],
        "total": {
            "read": read,
            **{what: everything[what] for what in KEPT},
            "dropped": read - sum(everything[w] for w in KEPT),
        },
        "steps": steps,
        "dropped": {reason: everything[reason] for reason in reasons},
        "reasons": reasons,
        "languages": {
            language: {
                "read": counts.total(),
                **{what: counts[what] for what in KEPT},
                "characters": {
                    what: tally.characters[f"{language} {what}"]
                    for what in (*KEPT, "repeated")
                    if tally.characters[f"{language} {what}"]
                },
                "dropped": {reason: counts[reason] for reason in reasons if counts[reason]},
            }
            for language, counts in languages.items()
        },
        "cleaned": {name: tally.cleaned[name] for name in CLEANED},
        "histograms": tally.histograms(),
        "samples": {
            "kept": {language: _excerpts(rows) for language, rows in sorted(tally.kept.items())},
            "dropped": {reason: _excerpts(tally.dropped[reason]) for reason in reasons},
        },
        "throughput": _throughput(work, steps),
        "fingerprint": Corpus.open(shards).fingerprint if shards.exists() else "",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "recipe": {name: value for name, value in asdict(recipe).items() if name not in PLACE},
    }


def _json(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def _excerpts(rows: list[Row]) -> list[Row]:
    return [row | {"text": row["text"][:EXCERPT]} for row in rows]


def funnel(
    recipe: Recipe, dropped: dict[str, int], reasons: dict[str, dict[str, str]], read: int
) -> list[dict[str, Any]]:
    """Of each step of the recipe: documents that came to it, and those that it dropped."""
    by_step: Counter[str] = Counter()
    for reason, count in dropped.items():
        by_step[reasons[reason]["step"]] += count
    names = [name.rpartition(":")[2] for name in recipe.steps if name != "tokenizer"]
    # A reason of a step that the recipe has not: another one gives it too, as "clean" does "empty".
    names[1:1] = [step for step in by_step if step not in names]
    rows = []
    for name in names:
        rows.append({"step": name, "documents": read, "dropped": by_step[name]})
        read -= by_step[name]
    return rows


def _throughput(work: Path, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each step: documents that came to it, seconds over all tasks by datatrove's statistics, and their quotient."""
    seconds: Counter[str] = Counter()
    for path in sorted(work.glob("logs/*/stats/*.json")):
        for step in json.loads(path.read_text()):
            timed = step["time_stats"] or {}  # 0 where a step had nothing to do
            seconds[step["name"].split(": ")[-1]] += timed.get("total", 0.0)
    documents = {row["step"]: row["documents"] for row in steps}
    corpus = next(place for place, row in enumerate(steps) if row["step"] in CORPUS_STEPS)
    order = [row["step"] for row in steps]
    order[corpus:corpus] = BETWEEN
    return [
        {
            "step": name,
            "documents": documents.get(name, steps[corpus]["documents"]),
            "seconds": round(seconds[name], 3),
            "per_second": round(documents.get(name, steps[corpus]["documents"]) / max(seconds[name], 1e-6), 1),
        }
        for name in order
        if seconds[name]
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the funnel: a row per language, a row per reason, damaged places, and the sum."""
    table = Table(title="documents by language", **LOOK)
    table.add_column("language", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    known = {language: row for language, row in result["languages"].items() if language != UNKNOWN}
    trained = [language for language in known if known[language]["training"]]
    for language in sorted(trained, key=lambda code: -known[code]["characters"]["training"]):
        table.add_row(language, *_cells(known[language]))
    rest = [row for language, row in known.items() if language not in trained]
    if rest:
        table.add_row(f"{len(rest)} others", *_cells(_sum(rest)))
    if UNKNOWN in result["languages"]:
        table.add_row("not known", *_cells(result["languages"][UNKNOWN]))
    table.add_section()
    table.add_row("all", *_cells(_sum(list(result["languages"].values()))))
    console.print(table)
    why = Table(title="dropped", **LOOK)
    why.add_column("documents", justify="right")
    why.add_column("reason")
    why.add_column("meaning")
    for reason, count in result["dropped"].items():
        why.add_row(str(count), reason, result["reasons"][reason]["meaning"])
    console.print(why)
    for row in result["archives"]:
        for fault in row["faults"]:
            console.print(f"damaged: {row['archive']}, byte {fault['offset']}: {fault['fault']}", soft_wrap=True)
    for row in result["archives"]:
        if row["bad"]:
            console.print(f"LEFT OUT: {row['bad']}", style="bold red", soft_wrap=True)
    emails, addresses, lines = (result["cleaned"][name] for name in ("emails", "ip_addresses", "mended_lines"))
    console.print(f"in what is kept: {emails} e-mail and {addresses} IP addresses masked, {lines} lines mended")
    total = result["total"]
    console.print(
        f"{total['read']} documents read from {len(result['archives'])} archives = {total['training']} for "
        f"training in {len(trained)} languages + {total['heldout']} held out + {total['dropped']} dropped",
        soft_wrap=True,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    apart = {"exact_duplicate", "near_duplicate", "small_language"}
    filtered = sum(count for reason, count in row["dropped"].items() if reason not in apart)
    numbers = [row["read"], filtered, *(row["dropped"].get(reason, 0) for reason in sorted(apart))]
    numbers += [row["heldout"], row["training"], row["characters"].get("training", 0)]
    return [f"{number:,}" if number else "" for number in numbers]


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    dropped = sum((Counter(row["dropped"]) for row in rows), Counter())
    characters = sum((Counter(row["characters"]) for row in rows), Counter())
    return {key: sum(row[key] for row in rows) for key in ("read", *KEPT)} | {
        "dropped": dropped,
        "characters": characters,
    }
