"""The sections of report.html about the documents: languages, quality, duplicates, samples."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from data_pipelines.report import KEPT, UNKNOWN
from xlscale.charts import Counts, histogram, mini_histogram
from xlscale.page import absent, bar, cell, head, table

TITLES = {
    "characters": "Characters of a document",
    "letters": "Share of letters, marks and digits in what is not space, of what came to filter",
    "certainty": "Certainty of the language",
    "perplexity": "Perplexity",
    "similarity": "Similarity of near duplicates to what was kept",
    "cluster_size": "Documents in a cluster of near duplicates",
}
OPEN = 3  # languages or reasons whose samples are seen at once

Report = dict[str, Any]


def languages(report: Report) -> str:
    """The funnel of each language, and how long its documents are."""
    found, reasons = report["languages"], report["reasons"]
    steps = [row["step"] for row in report["steps"] if row["dropped"]]
    all_characters = sum(row["characters"].get("training", 0) for row in found.values()) or 1
    trained = trained_in(report)
    rest = sorted(known_in(report).keys() - set(trained), key=lambda code: (-found[code]["read"], code))

    def cells(name: str, codes: Sequence[str]) -> str:
        dropped: Counter[str] = Counter()
        for code in codes:
            for reason, count in found[code]["dropped"].items():
                dropped[reasons[reason]["step"]] += count
        kept = [sum(found[code][what] for code in codes) for what in ("read", *reversed(KEPT))]
        characters = sum(found[code]["characters"].get("training", 0) for code in codes)
        share = characters / all_characters
        numbers = [kept[0], *(dropped[step] for step in steps), *kept[1:], characters]
        return (
            cell(name)
            + "".join(cell(number(n), n, off=not n) for n in numbers)
            + f'<td class="barred" data-value="{share}">{bar(share) if characters else ""}</td>'
        )

    heads = [
        "language",
        "found",
        *(f"\u2212\xa0{step}" for step in steps),
        "held out",
        "training",
        "characters",
        "share",
    ]
    numbers = set(range(1, len(heads) - 1))
    sums = [cells("others", rest)] if rest else []
    sums += [cells("not known", [UNKNOWN])] if UNKNOWN in found else []
    sums.append(cells("all", list(found)))
    more = table(heads, [cells(code, [code]) for code in rest], sortable=True, numbers=numbers)
    told = (
        f"{len(trained)} of {len(trained) + len(rest)} languages have enough documents for training; the one with most "
        "characters stands first. With a minus: what each step dropped. Share: of the characters in training."
    )
    return (
        head("Languages", told)
        + table(heads, [cells(code, [code]) for code in trained], sums, sortable=True, numbers=numbers)
        + (f"<details><summary>the {counted(len(rest), 'other')}</summary>{more}</details>" if rest else "")
        + _lengths(report, trained)
    )


def _lengths(report: Report, codes: list[str]) -> str:
    """A small histogram of characters for each language."""
    measured = report["histograms"]["characters"]
    edges, minis = measured["edges"], []
    empty = [0] * (len(edges) + 1)
    of = {code: [measured[what].get(code, empty) for what in ("kept", "dropped")] for code in codes}
    filled = [place for both in of.values() for values in both for place, count in enumerate(values) if count]
    if not filled:
        return ""
    span = (min(filled), max(filled) + 1)
    for code, (kept, dropped) in of.items():
        row = report["languages"][code]
        mean = row["characters"].get("training", 0) / (row["training"] or 1)
        both = [Counts("kept", kept), Counts("dropped", dropped, "second")]
        minis.append(mini_histogram(code, f"{mean:,.0f}", both, span))
    low = _power(edges[span[0] - 1]) if span[0] else "0"
    high = _power(edges[span[1] - 1]) if span[1] <= len(edges) else "more"
    return (
        f'<p class="note">Characters of a document, from {low} to {high}, each column twice as long as the one before; '
        "the number is the mean in training. Blue is kept, orange dropped.</p>"
        f'<div class="minis">{"".join(minis)}</div>'
    )


def quality(report: Report) -> str:
    """Length, letters, certainty and perplexity of what was kept and what was dropped."""
    names = ["characters", "letters", "certainty", *(["perplexity"] if "perplexity" in _steps(report) else [])]
    charts = "".join(_histogram(report, name) for name in names)
    told = "Documents with a text, kept for training or held out, and dropped by any step."
    return head("Quality", told) + f'<div class="pair">{charts}</div>'


def duplicates(report: Report) -> str:
    """Exact and near duplicates, and repeated paragraphs, by language."""
    reasons = ("exact_duplicate", "near_duplicate", "repeated_paragraphs")
    missing = [name for name in ("exact", "near", "paragraphs") if name not in _steps(report)]
    rows = []
    for code, row in sorted(report["languages"].items(), key=lambda item: -item[1]["read"]):
        numbers = [*(row["dropped"].get(reason, 0) for reason in reasons), row["characters"].get("repeated", 0)]
        if any(numbers):
            share = sum(numbers[:3]) / row["read"]
            rows.append(
                cell(code)
                + "".join(cell(number(n), n, off=not n) for n in (row["read"], *numbers))
                + cell(f"{share:.1%}", share)
                + f'<td class="barred" data-value="{share}">{bar(share, "second")}</td>'
            )
    exact, near, repeated = (report["dropped"].get(reason, 0) for reason in reasons)
    told = (
        f"Dropped: {exact:,} with the text of another page, {near:,} with almost the text of another, {repeated:,} of "
        "which too little was left without the paragraphs of others."
    )
    if missing:
        told += f" The recipe has no step {' nor '.join(missing)}."
    if not rows:
        return absent("Duplicates", told)
    heads = ["language", "read", "exact", "near", "by paragraphs", "characters taken out", "dropped", ""]
    charts = "".join(_histogram(report, name) for name in ("similarity", "cluster_size"))
    return (
        head("Duplicates", told)
        + table(heads, rows, sortable=True, numbers=set(range(1, 7)))
        + f'<div class="pair">{charts}</div>'
    )


def samples(report: Report) -> str:
    """Some of what was kept, by language, and of what was dropped, by reason."""
    kept, dropped = report["samples"]["kept"], report["samples"]["dropped"]
    blocks = [
        (f"{code}: {len(kept[code])} of {report['languages'][code]['training']:,}", kept[code])
        for code in trained_in(report)
        if kept.get(code)
    ]
    others = [
        (f"{reason.replace('_', ' ')}: {len(rows)} of {report['dropped'][reason]:,}", rows)
        for reason, rows in dropped.items()
        if rows
    ]
    told = "Their beginnings, e-mail and IP addresses masked. Drawn at random: those with the lowest ids."
    return (
        head("Kept, samples by language", told)
        + _folded(blocks)
        + head("Dropped, samples by reason", "As they were when the step dropped them; some had no text yet.")
        + _folded(others)
    )


def _folded(blocks: Iterable[tuple[str, list[Report]]]) -> str:
    """Samples under a line that opens them."""
    parts = [
        f'<details class="example"{" open" if place < OPEN else ""}><summary>{escape(title)}</summary>'
        f"{''.join(map(_sample, rows))}</details>"
        for place, (title, rows) in enumerate(blocks)
    ]
    return f'<div class="examples">{"".join(parts)}</div>' if parts else '<p class="empty">none</p>'


def _sample(row: Report) -> str:
    language = row.get("language", "")
    facts = {"similarity": row.get("similarity"), "cluster of": row.get("cluster_size")}
    told = [row.get("url", ""), language, *(f"{name} {value}" for name, value in facts.items() if value is not None)]
    tag = f' lang="{escape(language.removesuffix("_XX").replace("_", "-"))}"' if language else ""
    text = re.sub(r"\n+", "\n", row["text"])
    shown = f'<p class="text" dir="auto"{tag}>{escape(text)}</p>' if text else "<p>no text</p>"
    return f"<small>{escape(' · '.join(part for part in told if part))}</small>{shown}"


def _histogram(report: Report, name: str) -> str:
    """A measure over all languages."""
    measured = report["histograms"][name]
    counts = [
        Counts(what, [sum(column) for column in zip(*measured[what].values(), strict=True)], style)
        for what, style in (("kept", "line"), ("dropped", "second"))
        if measured[what]
    ]
    form: Callable[[float], str] = "{:.2g}".format if measured["edges"][-1] < 1 else _power
    return histogram(TITLES[name], measured["edges"], counts, form)


def _steps(report: Report) -> set[str]:
    return {row["step"] for row in report["steps"]}


def known_in(report: Report) -> Report:
    return {code: row for code, row in report["languages"].items() if code != UNKNOWN}


def trained_in(report: Report) -> list[str]:
    """Languages of the shards, the one with most characters first."""
    known = {code: row for code, row in known_in(report).items() if row["training"]}
    return sorted(known, key=lambda code: (-known[code]["characters"]["training"], code))


def _power(value: float) -> str:
    """1,024 as 1k, 2 ** 20 as 1M."""
    for size, sign in ((2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def number(value: int) -> str:
    return f"{value:,}" if value else ""


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else ""


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
