"""report.html: report.json on one page that needs nothing but itself, with the tokenizer's figures where it has one."""

import json
from collections import Counter
from html import escape
from pathlib import Path

from data_pipelines.page_corpus import (
    Report,
    counted,
    duplicates,
    known_in,
    languages,
    number,
    percent,
    quality,
    samples,
    trained_in,
)
from data_pipelines.steps.document import write_whole
from xlscale.page import absent, bar, cell, head, table, tiles, whole_page

ARCHIVES_SHOWN = 100
TOKENIZER_REPORT = "tokenizer-report.json"


def write_page(output: Path) -> Path:
    """Writes `output`/report.html of what lies beside it; returns its path."""
    report = json.loads((output / "report.json").read_text("utf-8"))
    path = output / TOKENIZER_REPORT
    trained = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if trained.get("fingerprint") != report["fingerprint"]:  # of shards that were here before
        trained = {}
    body = header(report, output.resolve().name)
    for section in (funnel, languages, quality, duplicates, samples, throughput, archives):
        body += section(report)
    body += tokenizer(trained) + facts(report)
    path = output / "report.html"
    write_whole(path, whole_page(output.resolve().name, body))
    return path


def header(report: Report, name: str) -> str:
    """The figures that one looks for first."""
    total, timed = report["total"], report["throughput"]
    known, trained = known_in(report), trained_in(report)
    seconds = sum(row["seconds"] for row in timed)
    damaged = sum(len(row["faults"]) for row in report["archives"])
    bad = sum(bool(row["bad"]) for row in report["archives"])
    characters = sum(row["characters"].get("training", 0) for row in report["languages"].values())
    figures = [
        ("read", f"{total['read']:,}", f"documents of {counted(len(report['archives']), 'archive')}"),
        ("training", f"{total['training']:,}", f"{percent(total['training'], total['read'])} of what was read"),
        ("held out", f"{total['heldout']:,}", "for evaluation"),
        ("languages", str(len(trained)), f"of {len(known)} found"),
        ("characters", _short(characters), "in training"),
        ("damage", str(damaged), f"places; {counted(bad, 'archive')} left out"),
        ("speed", f"{total['read'] / seconds:,.0f}" if seconds else "-", "documents/s per core, all steps"),
    ]
    return f"<h1>{escape(name)}</h1>{tiles(figures)}"


def funnel(report: Report) -> str:
    """What each step left over, and for which reasons documents were dropped."""
    read = report["total"]["read"] or 1
    rows = []
    for row in report["steps"]:
        left = row["documents"] - row["dropped"]
        lost = bar(row["dropped"] / read, "second") if row["dropped"] else ""
        rows.append(
            cell(row["step"])
            + "".join(cell(number(row[key]), row[key], off=not row[key]) for key in ("documents", "dropped"))
            + cell(percent(row["dropped"], row["documents"]), row["dropped"] / (row["documents"] or 1))
            + cell(number(left), left)
            + f'<td class="barred" data-value="{left}">{bar(left / read)}{lost}</td>'
        )
    why = [
        cell(told["step"])
        + cell(reason.replace("_", " "))
        + cell(number(report["dropped"][reason]), report["dropped"][reason])
        + f'<td class="wrap">{escape(told["meaning"])}</td>'
        for reason, told in report["reasons"].items()
    ]
    heads = ["step", "documents", "dropped", "of these", "left", "left / dropped, of all that was read"]
    return (
        head("Funnel", "The recipe's steps in their order: documents that came to each, and what it dropped.")
        + table(heads, rows, numbers={1, 2, 3, 4})
        + table(["step", "reason", "documents", "meaning"], why, sortable=True, numbers={2})
    )


def throughput(report: Report) -> str:
    """Documents a second and core, and where the time goes."""
    timed = report["throughput"]
    seconds = sum(row["seconds"] for row in timed)
    if not seconds:
        return absent("Throughput", "The run left no times of its steps.")
    rows = [
        cell(row["step"])
        + cell(number(row["documents"]), row["documents"])
        + cell(f"{row['seconds']:,.1f}", row["seconds"])
        + cell(f"{row['per_second']:,.0f}", row["per_second"])
        + f'<td class="barred" data-value="{row["seconds"]}">{bar(row["seconds"] / seconds)}</td>'
        for row in timed
    ]
    read = report["total"]["read"]
    sums = cell("all") + cell(number(read), read) + cell(f"{seconds:,.1f}", seconds)
    sums += cell(f"{read / seconds:,.0f}", read / seconds) + "<td></td>"
    heads = ["step", "documents", "core seconds", "documents/s per core", "share of the time"]
    told = "Over all tasks, without the time to start them. What exact, near, paragraphs and hold_out need of all "
    return head("Throughput", told + "documents at once is in sign, gather, join and decide.") + table(
        heads, rows, [sums], sortable=True, numbers={1, 2, 3}
    )


def archives(report: Report) -> str:
    """What was read, damaged archives first."""
    rows = sorted(report["archives"], key=lambda row: (not row["bad"], -len(row["faults"])))
    records: Counter[str] = Counter()
    for row in rows:
        records.update(row["records"])
    cells = []
    for row in rows[:ARCHIVES_SHOWN]:
        faults = [f"byte {fault['offset']:,}: {fault['fault']}" for fault in row["faults"][:3]]
        more = [f"and {len(row['faults']) - 3} more"] if len(row["faults"]) > 3 else []
        bad = [f"left out: {row['bad']}"] if row["bad"] else []
        cells.append(
            f'<td class="wrap">{escape(row["archive"])}</td>'
            + cell(f"{row['bytes'] / 1e6:,.1f}", row["bytes"])
            + cell(number(sum(row["records"].values())), sum(row["records"].values()))
            + f'<td class="wrap">{escape("; ".join([*bad, *faults, *more]))}</td>'
        )
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in records.most_common())
    told = f"{counted(len(rows), 'archive')}, {sum(row['bytes'] for row in rows) / 1e6:,.1f} MB; records: {kinds}."
    if len(rows) > ARCHIVES_SHOWN:
        told += f" Shown are {ARCHIVES_SHOWN}, those with damage first."
    return head("Archives", escape(told)) + table(
        ["archive", "MB", "records", "damage"], cells, sortable=True, numbers={1, 2}
    )


def tokenizer(trained: Report) -> str:
    """How well the recipe's tokenizer cuts each language, and another one beside it."""
    if not trained:
        return absent("Tokenizer", "None was trained on these shards: python -m data_pipelines tokenizer RECIPE")
    other = trained.get("against", {})
    names = {"tokens_per_word": "tokens/word", "tokens_per_character": "tokens/character", "unknown": "unknown"}
    heads = ["language", "characters", *names.values(), *(f"{name}, against" for name in names.values() if other)]
    longest = max(row["tokens_per_character"] for row in trained["languages"].values())
    rows = []
    for code in sorted(trained["languages"], key=lambda code: trained["languages"][code]["tokens_per_character"]):
        mine = trained["languages"][code]
        both = [mine, *([other["languages"][code]] if other else [])]
        bars = "".join(
            bar(row["tokens_per_character"] / longest, style) for row, style in zip(both, ("", "second"), strict=False)
        )
        rows.append(
            cell(code)
            + cell(number(mine["characters"]), mine["characters"])
            + "".join(_figure(row[name], name) for row in both for name in names)
            + f'<td class="barred" data-value="{mine["tokens_per_character"]}">{bars}</td>'
        )
    told = (
        f"{escape(trained['settings']['kind'].replace('_', ' '))}, {trained['pieces']:,} ids, learnt from "
        f"{trained['characters']:,} characters; about {trained['memory_gib']:.2g} GiB of memory were predicted. "
        "Measured on held-out text; no tokens/word where a script has no spaces. Bars: tokens/character."
    )
    if other:
        told += f" Orange, against: {escape(other['folder'])}, {other['pieces']:,} ids."
    return head("Tokenizer", told) + table([*heads, ""], rows, sortable=True, numbers=set(range(1, len(heads))))


def facts(report: Report) -> str:
    """What made it, and how it is known again."""
    cleaned = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["cleaned"].items())
    pairs = {
        "cleaned": f"{cleaned} in what was kept",
        "fingerprint": report["fingerprint"],
        "recipe": report.get("config_hash", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())
    recipe = escape(json.dumps(report["recipe"], ensure_ascii=False, indent=1))
    return (
        head("Facts")
        + f'<div class="card"><dl>{listed}</dl></div>'
        + f"<details><summary>the recipe, with all its defaults</summary><pre>{recipe}</pre></details>"
    )


def _figure(value: float | None, name: str) -> str:
    if value is None:
        return cell("-", "")
    return cell({"unknown": f"{value:.2%}", "tokens_per_word": f"{value:.2f}"}.get(name, f"{value:.3f}"), value)


def _short(number: int) -> str:
    """12,345,678 as 12.3M."""
    for size, sign in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return str(number)
