"""Duplicates: of pages with the same text, or almost, the first by id stays.

Near duplicates by MinHash: a page's signature is made of its shingles of characters (words would need to be
told apart, which many scripts do not do); two pages that share all hashes of a band are compared by the whole
signature.
"""

import base64
import hashlib
import re
from collections import Counter

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from rensa import RMinHash

from data_pipelines.config import DeduplicateConfig
from data_pipelines.steps.document import DocumentStep, drop, dropped
from data_pipelines.steps.filter import DENSE_WEIGHT, weight

_NO_WORD = re.compile(r"[\W\d_]+")
# One odd 64-bit number for each place in a shingle: powers of an odd number are odd.
_FACTORS = np.cumprod(np.full(64, 0x9E3779B97F4A7C15, dtype=np.uint64))


class DropExactDuplicates(DocumentStep):
    """Drops a document whose text, spaces aside, is that of one before."""

    name = "exact"

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bytes, str] = {}

    def process(self, document: Document) -> None:
        digest = hashlib.blake2b(" ".join(document.text.split()).encode("utf-8"), digest_size=16).digest()
        if digest in self.seen:
            document.metadata["duplicate_of"] = self.seen[digest]
            drop(document, "exact_duplicate")
        else:
            self.seen[digest] = document.id


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
    # The sum is linear in the characters; this (the end of splitmix64) is not.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


class SignDocuments(DocumentStep):
    """Sets metadata["signature"]: the MinHash of the document's shingles, 4 bytes a hash, in base 85."""

    name = "sign"

    def __init__(self, config: DeduplicateConfig):
        super().__init__()
        self.config = config

    def process(self, document: Document) -> None:
        hashes = shingles(document.text, self.config.shingle)
        size = self.config.bands * self.config.rows
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], size, self.config.seed)
        digest = np.array(matrix.to_rows()[0], dtype="<u4")
        document.metadata["signature"] = base64.b85encode(digest.tobytes()).decode("ascii")


class DropNearDuplicates(PipelineStep):
    """Drops a document that is like one kept before; remembers a signature per kept document."""

    type, name = "xlscale", "near"

    def __init__(self, config: DeduplicateConfig):
        super().__init__()
        self.config = config
        self.signatures: list[np.ndarray] = []
        self.ids: list[str] = []
        self.tables: list[dict[bytes, list[int]]] = [{} for _ in range(config.bands)]
        self.clusters: Counter[str] = Counter()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            encoded = document.metadata.pop("signature")
            if not dropped(document):
                with self.track_time():
                    self.compare(document, np.frombuffer(base64.b85decode(encoded), dtype="<u4"))
            yield document

    def compare(self, document: Document, signature: np.ndarray) -> None:
        """Drop the document, or remember it as kept."""
        keys = [band.tobytes() for band in signature.reshape(self.config.bands, self.config.rows)]
        candidates = {place for table, key in zip(self.tables, keys, strict=True) for place in table.get(key, ())}
        best = max(((self._similarity(signature, place), -place) for place in candidates), default=(0.0, 0))
        if best[0] >= self.config.min_similarity:
            first = self.ids[-best[1]]
            self.clusters[first] += 1
            document.metadata |= {"duplicate_of": first, "similarity": round(best[0], 3)}
            drop(document, "near_duplicate")
            return
        for table, key in zip(self.tables, keys, strict=True):
            table.setdefault(key, []).append(len(self.ids))
        self.signatures.append(signature)
        self.ids.append(document.id)

    def _similarity(self, signature: np.ndarray, place: int) -> float:
        return float(np.mean(signature == self.signatures[place]))
