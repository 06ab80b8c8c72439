"""The stream of training samples, addressed by position: slots to batches, the same at any world size.

B rows of a batch, T tokens of a row
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from xlscale.config_rules_data import CHANGES, NEVER_CHANGES
from xlscale.config_sections import Config, DataConfig, MaskingConfig
from xlscale.data.masking import MaskRules, mask_rules, mask_tokens, probability_at
from xlscale.data.order import EpochOrder, mix
from xlscale.data.packing import Packing, Plan
from xlscale.data.sampling import REPLACEMENT, Lanes, LanguageSchedule, Phase, integer_shares, language_shares
from xlscale.data.shards import DamagedChunk
from xlscale.data.tokens import Tokens, open_tokens
from xlscale.data.tokens_derive import Progress
from xlscale.languages import language_id
from xlscale.tokenizer_bpe import load_tokenizer
from xlscale.tokenizer_hub import HubTokenizer

ORDER_VERSION = 2
"""Raised with every change after which a slot holds something else; another version's state is refused."""

_REPLACEMENTS = 64  # tries to find a sample in place of a damaged one
_CACHE_BYTES = 256 << 20  # of ids that were tokenised on the fly: a lane goes on in the same few chunks
_CACHE_CHUNKS = 8192


class Replaced(NamedTuple):
    """A sample whose chunk could not be read: it holds another one of its language."""

    slot: int
    language: str
    shard: str
    cause: str


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
    segments: np.ndarray | None = None
    """[B, T] int32, documents of a row numbered from 1, 0 on padding; None when tokens attend across documents."""
    replaced: tuple[Replaced, ...] = ()
    """Rows that are not what their slots say, because that could not be read."""


class Stream:
    """What every slot holds, a pure function of (fingerprints, seed, slot); it has no position.

    In an epoch of a language each of its blocks comes once, in an order that belongs to language and epoch.
    """

    def __init__(
        self,
        tokens: Tokens,
        tokenizer: HubTokenizer,
        data: DataConfig,
        masking: MaskingConfig,
        seed: int,
        global_batch_size: int,
    ):
        assert tokens.tokenizer == tokenizer.digest, "token shards of another tokenizer"
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} must lie between 0 and 2**63 - 1: it is half of a generator's key")
        self.tokens, self.masking, self.seed = tokens, masking, seed
        self.languages = tokens.languages
        self.vocab_size = tokenizer.vocab_size
        self.packing = Packing(
            data.packing,
            data.sequence_length,
            data.document_attention,
            tokenizer.bos_id,
            tokenizer.pad_id,
        )
        self.lanes = Lanes.of(global_batch_size, data.lanes, data.language_run)
        self.phases = sampling_phases(data, self.languages, lambda code: tokens.size(code, data.sampling_over))
        # Ids of xlscale.languages, so that a language keeps its order whichever others are there.
        self._keys = mix(seed, np.array([language_id(language) for language in self.languages]))
        self._map()
        self.blocks_per_language = [int(starts[-1]) for starts in self._starts]
        self._schedule = LanguageSchedule(self.phases, self.blocks_per_language, self.lanes, seed)
        self._rules: MaskRules = mask_rules(masking, tokenizer)
        self._chunks: OrderedDict[tuple[int, int], tuple[np.ndarray, Plan]] = OrderedDict()
        self._cached_bytes = 0
        self._damaged: dict[tuple[int, int], DamagedChunk] = {}

    def __getstate__(self) -> dict[str, Any]:
        here = {"_starts": None, "_order": None}  # mapped files and what hangs on them
        return {**self.__dict__, **here, "_chunks": OrderedDict(), "_cached_bytes": 0, "_damaged": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        self._starts = [self.tokens.block_starts(language, self.packing) for language in self.languages]
        self._order = EpochOrder(self._starts, self.lanes.lanes, self._keys)

    def probabilities(self, step: int) -> np.ndarray:
        """Wanted share of each language in update `step` (0-based)."""
        return self._schedule.shares(step)

    def locate(self, slots: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Language (index), block and epoch of each slot."""
        languages, samples = self._schedule(np.asarray(slots, dtype=np.int64))
        epochs, blocks = self._order(languages, samples)
        return languages, blocks, epochs

    def chunk_of(self, language: int, block: int) -> tuple[int, int]:
        """The chunk of a language that a block is in, and its number there."""
        starts = self._starts[language]
        chunk = int(starts.searchsorted(block, side="right")) - 1
        return chunk, block - int(starts[chunk])

    def batch(self, slots: Sequence[int] | np.ndarray) -> Batch:
        """The samples of `slots` (from 0, in any order), each with the mask of its slot.

        A sample that cannot be read is replaced by another one of its language; ValueError when there is none.
        """
        slots = np.asarray(slots, dtype=np.int64)
        languages, blocks, epochs = self.locate(slots)
        shape = (len(slots), self.packing.sequence_length)
        ids_BT = np.empty(shape, dtype=np.int64)
        segments_BT = np.empty(shape, dtype=np.int32) if self.packing.segments else None
        replaced: list[Replaced] = []
        where = zip(slots.tolist(), languages.tolist(), blocks.tolist(), epochs.tolist(), strict=True)
        for row, (slot, language, block, epoch) in enumerate(where):
            segments_T = None if segments_BT is None else segments_BT[row]
            try:
                self._fill(language, block, ids_BT[row], segments_T)
            except DamagedChunk as damage:
                replaced.append(Replaced(slot, self.languages[language], damage.shard, damage.cause))
                self._replace(language, block, epoch, damage, ids_BT[row], segments_T)
        probability_B = probability_at(slots // self.lanes.batch, self.masking)
        input_ids_BT, labels_BT = mask_tokens(ids_BT, slots, probability_B, self.seed, self._rules)
        attention_mask_BT = ids_BT != self.packing.pad_id
        return Batch(
            input_ids=input_ids_BT,
            labels=labels_BT,
            attention_mask=None if attention_mask_BT.all() else attention_mask_BT,
            languages=languages,
            slots=slots,
            segments=segments_BT,
            replaced=tuple(replaced),
        )

    def read_ahead(self, slots: Sequence[int] | np.ndarray) -> None:
        """Let what `slots` need come from far away, in the background."""
        if not self.tokens.is_remote:
            return
        languages, blocks, _ = self.locate(slots)
        for language in np.unique(languages):
            chunks = np.searchsorted(self._starts[language], blocks[languages == language], side="right") - 1
            self.tokens.read_ahead(self.languages[language], np.unique(chunks).tolist())

    def _fill(self, language: int, block: int, ids_T: np.ndarray, segments_T: np.ndarray | None) -> None:
        chunk, inside = self.chunk_of(language, block)
        ids, plan = self._chunk(language, chunk)
        self.packing.fill(plan, ids, inside, ids_T, segments_T)

    def _replace(
        self,
        language: int,
        block: int,
        epoch: int,
        damage: DamagedChunk,
        ids_T: np.ndarray,
        segments_T: np.ndarray | None,
    ) -> None:
        """Fill a row from a block that depends on language, epoch and damaged block only, so on no rank or worker."""
        for attempt in range(_REPLACEMENTS):
            drawn = mix(self._keys[language], REPLACEMENT, epoch, block, attempt)[0]
            try:
                self._fill(language, int(drawn % np.uint64(self.blocks_per_language[language])), ids_T, segments_T)
                return
            except DamagedChunk:
                continue
        raise ValueError(
            f"{self.languages[language]}: {_REPLACEMENTS} samples in a row cannot be read; the last one: {damage}"
        )

    def _chunk(self, language: int, number: int) -> tuple[np.ndarray, Plan]:
        """Ids of a chunk and what its blocks hold; the chunks used last are kept."""
        key = (language, number)
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key]
        if key in self._damaged:
            # Without its traceback, which would grow with every sample and keep all batches.
            raise self._damaged[key].with_traceback(None)
        try:
            chunk = self.tokens.chunk(self.languages[language], number)
        except DamagedChunk as damage:
            if damage.cause != "network":  # which may come back, and is not asked at every sample anyway
                self._damaged[key] = damage
            raise
        plan = self.packing.plan(chunk.lengths)
        self._chunks[key] = chunk.ids, plan
        self._cached_bytes += _owned(chunk.ids)
        while self._cached_bytes > _CACHE_BYTES or len(self._chunks) > _CACHE_CHUNKS:
            _, (ids, _) = self._chunks.popitem(last=False)
            self._cached_bytes -= _owned(ids)
        return chunk.ids, plan

    def state_dict(self, slot: int) -> dict[str, Any]:
        """State of a stream that goes on at `slot`, for JSON: the position, and what gives it its meaning."""
        return {
            "slot": slot,
            "order_version": ORDER_VERSION,
            "corpus": self.tokens.fingerprint,
            "tokenizer": self.tokens.tokenizer,
            "sequence_length": self.packing.sequence_length,
            "packing": self.packing.name,
            "languages": self.languages,
            "sampling": [[phase.step, list(phase.shares)] for phase in self.phases],
            "language_run": self.lanes.run,
            "lanes": self.lanes.lanes,
            "global_batch_size": self.lanes.batch,
            "seed": self.seed,
        }

    def check_state(self, state: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
        """What differs, a line each, if the slots of `state` hold other samples here; `allowed` names what may.

        ValueError, a line for each thing that differs and is not allowed.
        """
        here = self.state_dict(0)
        # What the sampling is to be later on may be decided later on.
        there = state | {"sampling": self._begun(state.get("sampling", []), state.get("slot", 0))}
        here["sampling"] = self._begun(here["sampling"], state.get("slot", 0))
        accepted, problems = [], []
        for name in CHANGES:
            if there.get(name) == here[name]:
                continue
            change = f"{name} was {_short(there.get(name))} when the run began and is {_short(here[name])} now"
            if name in allowed and name not in NEVER_CHANGES:
                accepted.append(change)
            else:
                way = f"{_WAY_OUT[name]}, or start a run of another name"
                way += "" if name in NEVER_CHANGES else f", or allow it: data.allow_changes = ['{name}']"
                problems.append(f"{change}: the order of the samples would change; {way}")
        if problems:
            raise ValueError("\n".join(problems))
        return accepted

    def _begun(self, phases: list[Any], slot: int) -> list[Any]:
        """The phases that samples before `slot` depend on: a phase also shortens the quota block that it ends."""
        size, found = self.lanes.updates_per_block, phases[:1]
        for before, phase in pairwise(phases):
            if (before[0] + (phase[0] - before[0]) // size * size) * self.lanes.batch < slot:
                found.append(phase)
        return found


_WAY_OUT = {
    "order_version": "go on with the release of xlscale that began the run",
    "corpus": "give data.shards the shards that it was begun with",
    "tokenizer": "give data.tokenizer the one that it was begun with",
    "sequence_length": "set data.sequence_length back",
    "packing": "set data.packing and data.document_attention back",
    "languages": "set data.languages back",
    "sampling": "set data.sampling_alpha, sampling_over, language_weights and phases back",
    "language_run": "set data.language_run back",
    "lanes": "set data.lanes back",
    "global_batch_size": "set training.global_batch_size back",
    "seed": "set training.seed back",
}


def _owned(ids: np.ndarray) -> int:
    """Bytes of an array's own: none where it is a window on a file."""
    return ids.nbytes if ids.flags.owndata else 0


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def sampling_phases(data: DataConfig, languages: Sequence[str], size: Callable[[str], int]) -> list[Phase]:
    """The shares of `languages` over the run by data.sampling_alpha, language_weights and phases.

    ValueError for a language that is not there, or one without a weight where others have one.
    """
    settings: dict[str, Any] = {"alpha": data.sampling_alpha, "weights": data.language_weights, "languages": []}
    phases: list[Phase] = []
    for given in [{"step": 0}, *data.phases]:
        # New weights or a new alpha take the place of both.
        settings |= {"weights": {}} if "alpha" in given else {}
        settings |= {key: value for key, value in given.items() if key != "step"}
        name = f"data.phases at step {given['step']}" if data.phases else "data.language_weights"
        drawn, weights = settings["languages"] or list(languages), settings["weights"]
        unknown = [code for code in (*drawn, *weights) if code not in languages]
        if unknown:
            raise ValueError(f"{name}: there is no {unknown[0]} in this run; its languages are {', '.join(languages)}")
        missing = [code for code in drawn if code not in weights] if weights else []
        if missing:
            raise ValueError(f"{name}: the weights lack {', '.join(missing)}; give every language a weight, or none")
        if weights:
            shares = integer_shares([weights[code] if code in drawn else 0 for code in languages])
        else:
            of_drawn = dict(zip(drawn, language_shares([size(code) for code in drawn], settings["alpha"]), strict=True))
            shares = [of_drawn.get(code, 0) for code in languages]
        if phases and phases[-1].step == given["step"]:
            phases.pop()
        phases.append(Phase(given["step"], tuple(shares)))
    return phases


def open_stream(config: Config, progress: Progress | None = None, workers: int = 0) -> Stream:
    """The stream that a config describes; derives the token shards first if they are not there.

    `workers` processes derive them; 0 = as many as there are CPU cores.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    tokens = open_tokens(config, tokenizer, workers or os.cpu_count() or 1, progress)
    training = config.training
    return Stream(tokens, tokenizer, config.data, config.masking, training.seed, training.global_batch_size)
