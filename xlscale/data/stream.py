"""The stream of training samples, addressed by position: slots to batches, the same at any world size.

B rows of a batch, T tokens of a row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xlscale.config_sections import Config, MaskingConfig
from xlscale.data.masking import mask_tokens
from xlscale.data.sampling import (
    BLOCK_ORDER,
    MASK,
    LanguageSchedule,
    keyed_generator,
    language_probabilities,
    language_shares,
    mix,
    permute,
)
from xlscale.data.shards import Corpus
from xlscale.data.tokens import Progress, TokenShards, prepare_tokens
from xlscale.languages import language_id
from xlscale.tokenizer_bpe import load_tokenizer
from xlscale.tokenizer_hub import HubTokenizer

ORDER_VERSION = 1
"""Raised with every change after which a slot holds something else; another version's state is refused."""


@dataclass(frozen=True)
class Batch:
    """Samples of some slots, masked."""

    input_ids: np.ndarray
    """[B, T] int64."""
    labels: np.ndarray
    """[B, T] int64, -100 where nothing is predicted."""
    attention_mask: np.ndarray | None
    """[B, T] bool, False on padding; None when nothing is padded."""
    languages: np.ndarray
    """[B] int64, index into Stream.languages."""
    slots: np.ndarray
    """[B] int64."""


class Stream:
    """What every slot holds, a pure function of (corpus fingerprint, seed, slot); it has no position.

    In an epoch of a language each of its blocks comes once, in an order that belongs to language and epoch.
    """

    def __init__(
        self,
        tokens: TokenShards,
        tokenizer: HubTokenizer,
        masking: MaskingConfig,
        seed: int,
        sampling_alpha: float,
    ):
        assert tokens.tokenizer == tokenizer.digest, "token shards of another tokenizer"
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} must lie between 0 and 2**63 - 1: it is half of a generator's key")
        self.tokens, self.masking, self.seed, self.sampling_alpha = tokens, masking, seed, sampling_alpha
        self.vocab_size = tokenizer.vocab_size
        self.languages = list(tokens.languages)
        self.blocks_per_language = [tokens.languages[language].blocks for language in self.languages]
        self.probabilities = language_probabilities(self.blocks_per_language, sampling_alpha)
        self._schedule = LanguageSchedule(language_shares(self.blocks_per_language, sampling_alpha), seed)
        # Ids of xlscale.languages, so that a language keeps its order whichever others are there.
        self._ids = np.array([language_id(language) for language in self.languages])
        self._blocks = np.array(self.blocks_per_language)
        self.vocab_size = tokenizer.vocab_size
        self._pad_id, self._mask_id, self._pieces = tokenizer.pad_id, tokenizer.mask_id, tokenizer.pieces

    def locate(self, slots: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Language (index), block and epoch of each slot."""
        languages, samples = self._schedule(np.asarray(slots, dtype=np.int64))
        sizes = self._blocks[languages]
        epochs, numbers = np.divmod(samples, sizes)
        return (
            languages,
            permute(numbers, sizes, mix(self.seed, BLOCK_ORDER, self._ids[languages], epochs)),
            epochs,
        )

    def batch(self, slots: Sequence[int] | np.ndarray) -> Batch:
        """The samples of `slots` (from 0, in any order), each with the mask of its slot."""
        slots = np.asarray(slots, dtype=np.int64)
        languages, blocks, _ = self.locate(slots)
        input_ids_BT = np.empty((len(slots), self.tokens.sequence_length), dtype=np.int64)
        labels_BT = np.empty_like(input_ids_BT)
        where = zip(slots.tolist(), languages.tolist(), blocks.tolist(), strict=True)
        for row, (slot, language, block) in enumerate(where):
            ids_T = self.tokens.blocks(self.languages[language])[block]
            rng = keyed_generator(self.seed, MASK, slot)
            input_ids_BT[row], labels_BT[row] = mask_tokens(ids_T, rng, self.masking, self._pieces, self._mask_id)
        attention_mask_BT = input_ids_BT != self._pad_id
        return Batch(
            input_ids=input_ids_BT,
            labels=labels_BT,
            attention_mask=None if attention_mask_BT.all() else attention_mask_BT,
            languages=languages,
            slots=slots,
        )

    def state_dict(self, slot: int) -> dict[str, Any]:
        """State of a stream that goes on at `slot`, for JSON: the position, and what gives it its meaning."""
        return {
            "slot": slot,
            "order_version": ORDER_VERSION,
            "corpus": self.tokens.fingerprint,
            "tokenizer": self.tokens.tokenizer,
            "sequence_length": self.tokens.sequence_length,
            "languages": self.languages,
            "sampling_alpha": self.sampling_alpha,
            "seed": self.seed,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError, a line for each thing that differs, if the slots of `state` hold other samples here."""
        problems = []
        for name, here in self.state_dict(0).items():
            if name == "slot" or state.get(name) == here:
                continue
            problems.append(
                f"{name} was {_short(state.get(name))} when the run began and is {_short(here)} now: the "
                f"order of the samples would change; {_WAY_OUT[name]}, or start a run of another name"
            )
        if problems:
            raise ValueError("\n".join(problems))


_WAY_OUT = {
    "order_version": "go on with the release of xlscale that began the run",
    "corpus": "give data.shards the shards that it was begun with",
    "tokenizer": "give data.tokenizer the one that it was begun with",
    "sequence_length": "set data.sequence_length back",
    "languages": "set data.languages back",
    "sampling_alpha": "set data.sampling_alpha back",
    "seed": "set training.seed back",
}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def open_stream(config: Config, progress: Progress | None = None) -> Stream:
    """The stream that a config describes; derives the token shards first if they are not there."""
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer)
    corpus = Corpus.open(data.shards, data.languages)
    tokens = prepare_tokens(corpus, tokenizer, data.sequence_length, data.cache, progress)
    return Stream(tokens, tokenizer, config.masking, config.training.seed, data.sampling_alpha)
