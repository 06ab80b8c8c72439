"""Tally: what became of each document, by language and reason, with histograms and a few samples.

Sums of tallies are the same in whatever order and parts documents were counted: counts and bins are added, and of the
samples those with the lowest ids stay. An id is a hash, so the lowest ones are drawn at random.
"""

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document

from data_pipelines.config import ReportConfig
from data_pipelines.steps.document import dropped, write_whole
from data_pipelines.steps.mask import mask_emails, mask_ip_addresses

CLEANED = ("mended_lines", "removed_lines", "emails", "ip_addresses")  # of a kept document's metadata, added up
SAMPLE_CHARACTERS = 2000  # of a document that is kept for a look
FACTS = ("url", "archive", "offset", "language", "duplicate_of", "similarity", "cluster_size")  # of it besides

Row = dict[str, Any]


class Measure(NamedTuple):
    """What a histogram is of."""

    edges: tuple[float, ...]
    """Bin 0 lies below the first, bin i from edges[i - 1] to below edges[i], the last bin from the last on."""
    of: Callable[[Document], float | None]
    """None: the document is not counted."""


SHARES = tuple(place / 50 for place in range(1, 50))
MEASURES = {
    "characters": Measure(tuple(2**power for power in range(5, 21)), lambda document: len(document.text) or None),
    "letters": Measure(SHARES, lambda document: document.metadata.get("letters")),
    "certainty": Measure(SHARES, lambda document: document.metadata.get("certainty")),
    "perplexity": Measure(
        tuple(2**power for power in range(4, 16)), lambda document: document.metadata.get("perplexity")
    ),
    "similarity": Measure(SHARES, lambda document: document.metadata.get("similarity")),
    "cluster_size": Measure(
        (2, 3, 4, 5, *(2**power for power in range(3, 21))), lambda document: document.metadata.get("cluster_size")
    ),
}


class Tally:
    """Counts documents as dropped (by reason) or kept, per language."""

    def __init__(self, config: ReportConfig):
        self.config = config
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.characters: Counter[str] = Counter()
        self.cleaned: Counter[str] = Counter()
        self.dropped: defaultdict[str, list[Row]] = defaultdict(list)
        """Samples by reason."""
        self.kept: defaultdict[str, list[Row]] = defaultdict(list)
        """Samples by language."""
        self.bins: dict[str, dict[str, dict[str, list[int]]]] = {name: {"kept": {}, "dropped": {}} for name in MEASURES}
        """Of each measure, what became of the document, and language: the number in each bin."""

    def drop(self, document: Document) -> None:
        """Count a dropped document."""
        reason, language = document.metadata["dropped"], document.metadata.get("language", "")
        self.counts[language][reason] += 1
        self._measure(document, "dropped", language)
        _look(self.dropped[reason], document, self.config.dropped_samples)

    def keep(self, document: Document, what: str) -> None:
        """Count a document that is kept, as `what` ("training", "heldout")."""
        language = document.metadata["language"]
        self.counts[language][what] += 1
        self.characters[f"{language} {what}"] += len(document.text)
        if "repeated_characters" in document.metadata:  # taken out of it
            self.characters[f"{language} repeated"] += document.metadata["repeated_characters"]
        self.cleaned.update({name: document.metadata[name] for name in CLEANED if document.metadata.get(name)})
        self._measure(document, "kept", language)
        if what == "training":
            _look(self.kept[language], document, self.config.kept_samples)

    def _measure(self, document: Document, what: str, language: str) -> None:
        for name, measure in MEASURES.items():
            value = measure.of(document)
            if value is not None:
                row = self.bins[name][what].setdefault(language, [0] * (len(measure.edges) + 1))
                row[bisect.bisect_right(measure.edges, value)] += 1

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Of each measure: its edges, and for "kept" and "dropped" by language the number of documents in each bin."""
        return {
            name: {"edges": MEASURES[name].edges} | {what: dict(sorted(rows.items())) for what, rows in found.items()}
            for name, found in self.bins.items()
        }

    def save(self, path: Path, **facts: Any) -> None:
        """Write it, with more `facts`, to a JSON file."""
        body = {
            "counts": {language: dict(sorted(row.items())) for language, row in sorted(self.counts.items())},
            "characters": dict(sorted(self.characters.items())),
            "cleaned": dict(sorted(self.cleaned.items())),
            "dropped": {reason: rows for reason, rows in sorted(self.dropped.items()) if rows},
            "kept": {language: rows for language, rows in sorted(self.kept.items()) if rows},
            "histograms": self.histograms(),
        }
        write_whole(path, json.dumps(body | facts, ensure_ascii=False) + "\n")

    def add(self, body: dict[str, Any]) -> None:
        """Add what another has saved."""
        for language, counts in body["counts"].items():
            self.counts[language].update(counts)
        self.characters.update(body["characters"])
        self.cleaned.update(body["cleaned"])
        for name, found in self.bins.items():
            for what, rows in found.items():
                for language, row in body["histograms"][name][what].items():
                    rows[language] = [a + b for a, b in zip(rows.get(language, [0] * len(row)), row, strict=True)]
        for reason, rows in body["dropped"].items():
            for row in rows:
                _put(self.dropped[reason], row, self.config.dropped_samples)
        for language, rows in body["kept"].items():
            for row in rows:
                _put(self.kept[language], row, self.config.kept_samples)


def _look(rows: list[Row], document: Document, size: int) -> None:
    """Put a document's beginning among the rows if it belongs there.

    Addresses are masked in it, whatever the recipe does: a report is shown to others.
    """
    row = {"id": document.id} | {key: document.metadata[key] for key in FACTS if key in document.metadata}
    if dropped(document):
        row["reason"] = document.metadata["dropped"]
    if len(rows) < size or (size and _order(row) < _order(rows[-1])):
        text = mask_ip_addresses(mask_emails(document.text[:SAMPLE_CHARACTERS])[0])[0]
        _put(rows, row | {"text": text}, size)


def _put(rows: list[Row], row: Row, size: int) -> None:
    """Keep the `size` rows with the lowest ids, in their order."""
    bisect.insort(rows, row, key=_order)
    del rows[size:]


def _order(row: Row) -> tuple[str, str, int]:
    return row["id"], row["archive"], row["offset"]
