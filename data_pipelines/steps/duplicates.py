"""Duplicates: of pages with the same text, or almost, the first by id stays.

Near duplicates by MinHash: a page's signature is made of its shingles of characters (words would need to be
told apart, which many scripts do not do); two pages that share all hashes of a band are compared by the whole
signature.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from rensa import RMinHash

from data_pipelines.config import DeduplicateConfig
from data_pipelines.steps.columns import column, mapped
from data_pipelines.steps.document import DocumentStep, drop
from data_pipelines.steps.filter import DENSE_WEIGHT, weight
from data_pipelines.steps.join import BandIndex, band_keys, mark_firsts, mark_lists, mark_near, scramble
from data_pipelines.steps.spool import SpooledStep

ROWS = 512  # signatures whose bands are hashed together
_NO_WORD = re.compile(r"[\W\d_]+")
# One odd 64-bit number for each place in a shingle: powers of an odd number are odd.
_FACTORS = np.cumprod(np.full(64, 0x9E3779B97F4A7C15, dtype=np.uint64))


def exact_key(text: str) -> bytes:
    """16 bytes that a text has in common with those that differ from it in spaces only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()


class DropExactDuplicates(SpooledStep):
    """Drops a document whose text, spaces aside, is that of one before."""

    name = "exact"
    columns = ("exact",)

    def facts(self, document: Document) -> Sequence[bytes]:
        return (exact_key(document.text),)

    def decide(self, folder: Path, total: int) -> None:
        self.first = column(folder / "first", np.uint32, (total,))
        mark_firsts(mapped(folder / "exact", "<u8", 2), self.memory, self.first)

    def mark(self, document: Document, place: int) -> None:
        if self.first[place]:
            drop_duplicate(document, "exact_duplicate", self.id_at(int(self.first[place]) - 1))


def drop_duplicate(document: Document, reason: str, original: str, similarity: float = 0.0) -> None:
    """Drop a document as a duplicate of the one whose id is `original`."""
    document.metadata["duplicate_of"] = original
    if similarity:
        document.metadata["similarity"] = round(similarity, 3)
    drop(document, reason)


def shingles(text: str, size: int) -> np.ndarray:
    """Hashes (uint64) of all runs of `size` characters of the text without case, digits and signs.

    In scripts whose characters are syllables or words a run has half as many.
    """
    dense = weight(text) > (1 + DENSE_WEIGHT) / 2 * len(text)
    size = max(2, size // 2) if dense else size
    codes = np.frombuffer(_NO_WORD.sub(" ", text.lower()).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    runs = max(1, len(codes) - size + 1)
    hashes = np.zeros(runs, dtype=np.uint64)
    for place, factor in zip(range(min(size, len(codes))), _FACTORS, strict=False):
        hashes += codes[place : place + runs] * factor
    return scramble(hashes)


class SignDocuments(DocumentStep):
    """Sets metadata["signature"]: the MinHash of the document's shingles, 4 bytes a hash, in base 64."""

    name = "sign"

    def __init__(self, config: DeduplicateConfig):
        super().__init__()
        self.config = config

    def process(self, document: Document) -> None:
        hashes = shingles(document.text, self.config.shingle)
        size = self.config.bands * self.config.rows
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], size, self.config.seed)
        digest = np.array(matrix.to_rows()[0], dtype="<u4")
        document.metadata["signature"] = base64.b64encode(digest.tobytes()).decode("ascii")


class DropNearDuplicates(SpooledStep):
    """Drops a document that is like one kept before; the first of a cluster gets its metadata["cluster_size"].

    Takes the metadata["signature"] of SignDocuments out. Bands are compared one by one (steps/join.py).
    """

    name = "near"
    columns = ("signatures",)

    def __init__(self, config: DeduplicateConfig, folder: Path | None = None, memory_mib: int = 256):
        super().__init__(folder, memory_mib)
        self.config = config

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in super().run(data, rank, world_size):
            document.metadata.pop("signature", None)
            yield document

    def facts(self, document: Document) -> Sequence[bytes]:
        return (signature(document),)

    def decide(self, folder: Path, total: int) -> None:
        self.first = column(folder / "first", np.uint32, (total,))
        self.shares = column(folder / "shares", np.float64, (total,))
        self.sizes = column(folder / "sizes", np.uint32, (total,))
        bands = self.config.bands
        signatures = mapped(folder / "signatures", "<u4", bands * self.config.rows)
        keys = column(folder / "keys", np.uint64, (bands, total))
        for start in range(0, total, ROWS):
            keys[:, start : start + ROWS] = band_keys(signatures[start : start + ROWS], bands)
        lists = column(folder / "lists", np.uint32, (bands, total + 1))
        for band in range(bands):
            mark_lists(keys[band], self.memory, lists[band])
        index = BandIndex(signatures, list(lists), folder)
        mark_near(index, self.config.min_similarity, self.first, self.shares, self.sizes)

    def mark(self, document: Document, place: int) -> None:
        if self.first[place]:
            original, share = self.id_at(int(self.first[place]) - 1), float(self.shares[place])
            drop_duplicate(document, "near_duplicate", original, share)
        elif self.sizes[place]:
            document.metadata["cluster_size"] = int(self.sizes[place]) + 1


def signature(document: Document) -> bytes:
    """What SignDocuments has set."""
    return base64.b64decode(document.metadata["signature"])
