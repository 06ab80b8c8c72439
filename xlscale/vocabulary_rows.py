"""The rows of another vocabulary out of those of a model: copied where the piece is the same, else made from others.

V ids of the new tokenizer, and the padding rows behind them
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xlscale.checkpoint.hub_folder import HubFolder
from xlscale.checkpoint.hub_names import VOCABULARY
from xlscale.config_sections import ModelConfig
from xlscale.models.init import initial_rows
from xlscale.tokenizer import SentencePieceTokenizer

_, BIAS = VOCABULARY
_BLOCK = 1 << 12  # rows read or drawn at a time
_MULTIPLE = 8  # of rows, where there are more than ids: so many ranks may share them
NEW = -1
"""In place of an old id: no row of that piece is there."""


def sources(old: SentencePieceTokenizer, new: SentencePieceTokenizer) -> np.ndarray:
    """The old id of the same piece or special token for each new id [V] int64, NEW where there is none."""
    old_ids = ids_by_piece(old)
    source_V = np.full(new.vocab_size, NEW, np.int64)
    for token_id in new.pieces:
        source_V[token_id] = old_ids.get(new.token(token_id), NEW)
    source_V[list(new.special_ids)] = old.special_ids
    return source_V


def ids_by_piece(tokenizer: SentencePieceTokenizer) -> dict[str, int]:
    """Piece -> id; of a piece that is there twice the first."""
    return {tokenizer.token(token_id): token_id for token_id in reversed(tokenizer.pieces)}


def keeps_ids(source_V: np.ndarray, old: SentencePieceTokenizer) -> bool:
    """Whether all old pieces are where they were, the new ones behind them."""
    return len(source_V) >= old.vocab_size and np.array_equal(source_V[: old.mask_id], np.arange(old.mask_id))


def with_padding(source_V: np.ndarray, old: SentencePieceTokenizer, model: ModelConfig) -> np.ndarray:
    """The same with the rows beyond the tokenizer's ids, whose number is the new vocab_size.

    New pieces use up the padding rows first, and those left stay as they are. Where there was padding, or in XL, a
    number that was a multiple of 8 remains one; a padding row more is NEW.
    """
    if keeps_ids(source_V, old):
        source_V = np.concatenate([source_V, np.arange(len(source_V), model.vocab_size)])
    padded = model.vocab_size > old.vocab_size or model.model_type == "xlm-roberta-xl"
    multiple = _MULTIPLE if padded and model.vocab_size % _MULTIPLE == 0 else 1
    return np.concatenate([source_V, np.full(-len(source_V) % multiple, NEW)])


class Mixture(NamedTuple):
    """What the row of a new piece is made of."""

    ids: np.ndarray
    """Old ones."""
    weights: np.ndarray
    """They sum to 1."""
    shift: float
    """Added to the bias (nats): the piece's log frequency in the new language above that of its parts there."""


class VocabularyRows:
    """All rows of a parameter of VOCABULARY for another vocabulary, a few at a time."""

    def __init__(
        self,
        opened: HubFolder,
        old_pieces: range,
        source_V: np.ndarray,
        new_pieces: range,
        mixtures: Mapping[int, Mixture] | None,
        seed: int = 0,
    ):
        """mixtures: None = new pieces are drawn from the seed, as a new model's are."""
        self._opened, self._old_pieces, self._source_V = opened, old_pieces, source_V
        self._new_pieces, self._mixtures, self._seed = new_pieces, mixtures, seed
        self._means: dict[str, Tensor] = {}
        self._drawn: tuple[str, int, Tensor] = ("", NEW, torch.empty(0))

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the whole parameter."""
        return (len(self._source_V), *self._opened.shapes[name][1:])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows in order; what is copied in the file's dtype, the rest in fp32."""
        for start, stop in self._runs:
            first = int(self._source_V[start])
            if first == NEW:
                yield from (self._made(name, row)[None] for row in range(start, stop))
            else:
                end = first + stop - start
                yield from (self._opened.rows(name, at, min(at + _BLOCK, end)) for at in range(first, end, _BLOCK))

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """Rows that are read as one, and rows that are new."""
        source_V = self._source_V
        is_new = source_V == NEW
        goes_on = (np.diff(source_V) == 1) & ~is_new[:-1] | is_new[1:] & is_new[:-1]
        bounds = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(source_V)]
        return list(pairwise(bounds))

    def _made(self, name: str, row: int) -> Tensor:
        """A row that is nowhere to be copied from."""
        if self._mixtures is None and row in self._new_pieces:
            return self._random(name, row)
        if self._mixtures is None or row not in self._mixtures:
            return self._mean(name)
        ids, weights, shift = self._mixtures[row]
        total = torch.zeros(self.shape(name)[1:], dtype=torch.float64)
        for token_id, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            total += self._opened.rows(name, token_id, token_id + 1)[0].double() * weight
        return (total + shift if name == BIAS else total).float()

    def _random(self, name: str, row: int) -> Tensor:
        start = row - row % _BLOCK
        if self._drawn[:2] != (name, start):
            shape = self.shape(name)
            stop = min(start + _BLOCK, shape[0])
            drawn = initial_rows(name, shape, self._opened.model, self._seed, start, stop)
            self._drawn = (name, start, drawn)
        return self._drawn[2][row - start]

    def _mean(self, name: str) -> Tensor:
        """Of all pieces. A padding row's logit is then the mean of theirs, and takes no more than its share."""
        if name not in self._means:
            total, stop = torch.zeros(self.shape(name)[1:], dtype=torch.float64), self._old_pieces.stop
            for at in range(self._old_pieces.start, stop, _BLOCK):
                total += self._opened.rows(name, at, min(at + _BLOCK, stop)).double().sum(dim=0)
            self._means[name] = (total / len(self._old_pieces)).float()
        return self._means[name]
