"""Sections of report.html about the data: languages, what was damaged, and the corpus that it came from."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from xlscale.charts import Point, mini_chart, smooth, ticks
from xlscale.page import absent, bar, cell, head, table
from xlscale.run_folder import Run

SHARDS_SHOWN = 100


def languages(run: Run) -> str:
    """A small loss curve per language, and a sortable table of shares and losses."""
    tokens: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    curves: dict[str, list[Point]] = {}
    for record in run.records:
        tokens.update(record.get("tokens_per_language") or {})
        samples.update(record.get("samples_per_language") or {})
        for language, loss in (record.get("loss_per_language") or {}).items():
            curves.setdefault(language, []).append((record["step"], loss))
    if not curves:
        return absent("Languages", "The run has no losses per language.")
    wanted = run.wanted_shares()
    smoothed = {language: smooth(curve, max(3, len(curve) // 12)) for language, curve in curves.items()}
    values = [value for curve in smoothed.values() for _, value in curve if value is not None]
    axis = ticks(min(values, default=0.0), max(values, default=1.0))
    span = (run.records[0]["step"], run.records[-1]["step"])
    order = sorted(curves, key=lambda language: (-tokens[language], language))
    minis = "".join(mini_chart(code, smoothed[code], axis[0], axis[-1], span) for code in order)
    all_samples = samples.total() or 1
    widest = max([*wanted.values(), *(count / all_samples for count in samples.values())], default=1.0) or 1.0
    rows = []
    for code in [*order, *sorted(wanted.keys() - curves.keys())]:  # those that did not come yet stand last
        share, wish = samples[code] / all_samples, wanted.get(code)
        first, last = _ends(curves.get(code, []))
        both = bar(share / widest) + (bar(wish / widest, "second") if wish is not None else "")
        rows.append(
            cell(code)
            + cell(f"{tokens[code]:,}", tokens[code])
            + (cell(f"{wish:.2%}", wish) if wish is not None else cell("-", ""))
            + cell(f"{share:.2%}", share)
            + f'<td class="barred" data-value="{share}">{both}</td>'
            + "".join(cell("-" if v is None else f"{v:.3f}", "" if v is None else v) for v in (first, last))
            + (cell(f"{last - first:+.3f}", last - first) if first is not None and last is not None else cell("-", ""))
        )
    heads = ["language", "tokens", "wanted", "realised", "realised / wanted"]
    heads += ["loss at first", "loss at last", "change"]
    axes = f"All curves: steps {span[0]:,} to {span[1]:,}, loss {axis[0]:g} to {axis[-1]:g}."
    return (
        head("Languages", f"{len(order)} languages, the one with most tokens first. {axes}")
        + f'<div class="minis">{minis}</div>{table(heads, rows, sortable=True, numbers={1, 2, 3, 5, 6, 7})}'
        '<p class="note">Wanted and realised: shares of the samples over all updates so far; where the sampling '
        "changed, the mean of what was wanted. First and last: means of a tenth of the updates that had the language. "
        "Bars: blue is realised, orange wanted.</p>"
    )


def damaged(run: Run) -> str:
    """What of the data could not be used, by shard and cause."""
    replaced: Counter[tuple[str, str]] = Counter()
    for record in run.records:
        for shard, causes in (record.get("replaced") or {}).items():
            replaced.update({(shard, cause): count for cause, count in causes.items()})
    left_out = Counter(
        {
            (shard, cause): count
            for shard, causes in (run.told("left_out_of") or {}).items()
            for cause, count in causes.items()
        }
    )
    documents = run.told("documents_left_out") or 0
    if not replaced and not documents:
        return absent("Damaged data", "No sample was replaced, and no document left out.")
    order = sorted(replaced | left_out, key=lambda at: (-replaced[at], -left_out[at], at))
    rows = [
        cell(shard) + cell(cause) + "".join(cell(f"{n:,}" if n else "", n, off=not n) for n in counts)
        for shard, cause in order[:SHARDS_SHOWN]
        for counts in [(replaced[shard, cause], left_out[shard, cause])]
    ]
    more = f" Shown are {SHARDS_SHOWN} of {len(order):,}, those with most." if len(order) > SHARDS_SHOWN else ""
    told = (
        f"{replaced.total():,} samples were replaced by others of their language, because their chunk could not be "
        f"read; {documents:,} documents were left out when the corpus was tokenised.{more}"
    )
    heads = ["shard", "cause", "samples replaced", "documents left out"]
    return head("Damaged data", told) + table(heads, rows, sortable=True, numbers={2, 3})


def corpus(run: Run) -> str:
    """What data_pipelines read, kept and dropped, by language."""
    found: Mapping[str, Any] = run.corpus.get("languages") or {}
    if not found:
        return absent("Corpus", "No report.json of data_pipelines lies beside the shards.")
    reasons = list(run.corpus.get("dropped") or {})
    kept = [code for code, row in found.items() if row.get("training")]
    rest = [code for code in found if code not in kept]
    kept.sort(key=lambda code: -found[code].get("characters", {}).get("training", 0))

    def cells(name: str, codes: Sequence[str]) -> str:
        dropped: Counter[str] = Counter()
        for code in codes:
            dropped.update(found[code].get("dropped", {}))
        numbers = [sum(found[code].get(key, 0) for code in codes) for key in ("read", "training", "heldout")]
        numbers.insert(2, sum(found[code].get("characters", {}).get("training", 0) for code in codes))
        numbers += [dropped[reason] for reason in reasons]
        return cell(name) + "".join(cell(f"{n:,}" if n else "", n, off=not n) for n in numbers)

    rows = [cells(code, [code]) for code in kept]
    sums = [cells(f"{len(rest)} others", rest)] if rest else []
    sums.append(cells("all", list(found)))
    heads = ["language", "read", "training", "characters", "held out"]
    heads += [reason.replace("_", " ") for reason in reasons]
    total = run.corpus.get("total", {})
    told = ", ".join(f"{escape(name)} {count:,}" for name, count in total.items())
    archives = len(run.corpus.get("archives") or [])
    return head(
        "Corpus", f"Documents from {archives} archives: {told}. After held out stand the reasons to drop."
    ) + table(heads, rows, sums, sortable=True, numbers=set(range(1, len(heads))))


def _ends(curve: Sequence[Point]) -> tuple[float | None, float | None]:
    """Means of the first and of the last tenth of a curve."""
    values = [value for _, value in curve if value is not None]
    size = max(1, len(values) // 10)
    return (statistics.fmean(values[:size]), statistics.fmean(values[-size:])) if values else (None, None)
