"""Another vocabulary for a trained model: pieces of a new language appended, or another tokenizer in place of the old.

Rows of pieces that stay are copied, rows of new ones are made from those; all other tensors are as they were. From Hub
folder to Hub folder, a few rows at a time.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from xlscale.checkpoint.adapter_file import ADAPTERS, read_adapter_file
from xlscale.checkpoint.hub import hub_writer, write_alone
from xlscale.checkpoint.hub_folder import HubFolder, open_hub_folder
from xlscale.checkpoint.hub_names import VOCABULARY, shapes_of
from xlscale.checkpoint.trunk import pieces_of, precision
from xlscale.config_sections import ModelConfig
from xlscale.extend import Extension, check_apart, extension_card
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.tokenizer_bpe import load_tokenizer
from xlscale.vocabulary_loss import HeldOut
from xlscale.vocabulary_mixtures import Mixtures, mixtures_of
from xlscale.vocabulary_pieces import Change, choose_pieces, learn_candidates, measure_change
from xlscale.vocabulary_rows import (
    NEW,
    VocabularyRows,
    keeps_ids,
    sources,
    with_padding,
)
from xlscale.vocabulary_texts import OLD_CHARACTERS, Texts, read_texts

log = logging.getLogger(__name__)

ROWS = ("mixture", "mean", "random")
"""What a new piece's row may be: a mixture of pieces like it (where the text says which), the mean of the pieces that
the old tokenizer cuts it into, or drawn from the seed."""


@dataclass(frozen=True, kw_only=True)
class VocabularyChanges:
    """What is asked for: either a tokenizer, or a corpus to learn `pieces` new ones on."""

    tokenizer: str | Path | None = None
    """Folder of the tokenizer to have from now on, taken as it is."""
    corpus: str | Path | None = None
    """Folder of shards, or a text file with a document a line: of the new language. With a tokenizer it may be left
    out; rows are then means, and no loss is measured."""
    pieces: int = 0
    """New pieces at most; 0 with a tokenizer."""
    language: str = ""
    """The new language, where the corpus has several or is a text file."""
    old_shards: str | Path | None = None
    """Folder of shards of old languages; by default the other languages of the corpus."""
    old_characters: int = OLD_CHARACTERS
    """Read of each old language, in whole documents."""
    protect: bool = False
    """Leave out pieces that would change the cut of the old text that is read."""
    rows: str = "mixture"
    """One of ROWS."""
    seed: int = 0
    """Of random rows, and of the order in which a large corpus is read."""
    loss: bool = True
    """Whether the loss at step 0 is measured: for each kind of rows a forward over 8,192 tokens on the CPU."""

    @property
    def some(self) -> bool:
        """Whether there is anything to do."""
        return self != VocabularyChanges()


@dataclass
class VocabularyExtension:
    """A folder as it will be."""

    opened: HubFolder
    languages: Extension | None
    """What becomes of the folder's languages, if anything does."""
    old: SentencePieceTokenizer
    new: SentencePieceTokenizer
    changes: VocabularyChanges
    texts: Texts | None
    source_V: np.ndarray
    """[rows] int64: the old row of each new one, -1 where there is none."""
    mixtures: Mixtures | None
    """What new pieces' rows are made of; None = drawn."""
    left_out: list[str] = field(default_factory=list)
    """Pieces that old text has a use for, with protect."""

    @property
    def model(self) -> ModelConfig:
        """Config of the new folder."""
        return replace((self.languages or self.opened).model, vocab_size=len(self.source_V))

    @property
    def new_rows(self) -> np.ndarray:
        """Ids of the pieces that the old tokenizer has not, ascending."""
        return np.flatnonzero(self.source_V[: self.new.vocab_size] == NEW)

    def rows(self, random: bool = False) -> VocabularyRows:
        """The rows of the new vocabulary; random: those of new pieces drawn, whatever was chosen."""
        mixtures = None if random or self.mixtures is None else self.mixtures.of
        seed = self.changes.seed
        return VocabularyRows(self.opened, self.old.pieces, self.source_V, self.new.pieces, mixtures, seed)

    def pieces(self, rows: VocabularyRows, name: str) -> Iterator[Tensor]:
        """The rows of a parameter of the new folder, a few at a time."""
        if name in VOCABULARY:
            return rows.pieces(name)
        return pieces_of(self.opened, name) if self.languages is None else self.languages.pieces(name)

    def change(self, documents: list[str]) -> Change:
        """What becomes of the cut of some documents."""
        return measure_change(self.old, self.new, self.source_V, documents)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """What the loss is measured on; None where it is not: unasked, or without text or the masked LM's head."""
        if self.texts is None or not self.changes.loss or self.opened.head != "ForMaskedLM":
            return None
        return HeldOut(self.texts.held_out, self.new, self.model)

    def losses(self) -> dict[str, float]:
        """Masked-LM loss (nats a token) on what is held out at step 0, by kind of rows: the chosen and random."""
        found: dict[str, float] = {}
        if self.held_out is None:
            return found
        for name in dict.fromkeys((self.changes.rows, "random")):
            rows = self.rows(random=name == "random")
            pieces = partial(self.pieces, rows)
            found[name] = self.held_out.loss(self.model, pieces, self._adapters)
        return found

    @property
    def _adapters(self) -> str:
        """The language whose adapters new text goes through: its own, else the default one, else the first."""
        model = self.model
        known = [code for code in (self.texts.language if self.texts else "", model.default_language) if code]
        return next((code for code in [*known, *model.languages] if code in model.languages), "")

    def told(self) -> Iterator[str]:
        """What was done and measured, a line each; the losses take a forward over the model."""
        first, count, ids = self.old.mask_id, len(self.new_rows), self.new.vocab_size
        yield (
            f"vocabulary: {self.old.vocab_size:,} -> {ids:,} ids, {self.opened.model.vocab_size:,} -> "
            f"{len(self.source_V):,} rows; <mask> {self.old.mask_id} -> {self.new.mask_id}"
        )
        if keeps_ids(self.source_V[:ids], self.old):
            yield (
                f"{count:,} new pieces, ids {first} to {first + count - 1}; all old ids stay"
                if count
                else "no new pieces"
            )
        else:
            yield f"{count:,} new pieces; {ids - count:,} of the {self.old.vocab_size:,} old ones stay, at other ids"
        if self.changes.protect:
            yield f"{len(self.left_out):,} pieces left out because old text has a use for them"
        made = {"drawn from the seed": count} if self.mixtures is None else self.mixtures.kinds
        yield f"rows of new pieces: {', '.join(f'{number:,} {kind}' for kind, number in made.items()) or 'none'}"
        if self.texts is not None:
            yield from self._told_of_texts(self.texts)

    def _told_of_texts(self, texts: Texts) -> Iterator[str]:
        found, name = self.change(texts.held_out), texts.language or "new text"
        yield (
            f"{name}: {found.tokens:,} -> {found.new_tokens:,} tokens ({found.new_tokens / max(found.tokens, 1):.2f}), "
            f"<unk> {found.unknown:,} -> {found.new_unknown:,}, in {found.documents} documents held out"
        )
        if not texts.old:
            yield "old languages: no text of theirs to see what becomes of it; --old-shards names a folder"
        for language, documents in texts.old.items():
            found = self.change(documents)
            yield (
                f"{language}: {found.changed_tokens / max(found.tokens, 1):.3%} of {found.tokens:,} tokens "
                f"cut otherwise, in {found.changed_documents:,} of {found.documents:,} documents"
            )
        if self.held_out is None:
            why = f"the folder's head is {self.opened.head}" if self.changes.loss else "--no-loss"
            yield f"masked-LM loss at step 0: not measured, {why}"
            return
        through = f" through the adapters of {self._adapters}" if self.opened.model.languages else ""
        told = ", ".join(f"{loss:.3f} with rows {kind}" for kind, loss in self.losses().items())
        yield f"masked-LM loss at step 0 on {name}{through}: {told} ({self.held_out.predicted:,} tokens predicted)"

    def write(self, out: str | Path, adapters: bool | None = None, told: Sequence[str] = ()) -> Path:
        """Write the new Hub folder, whole or not at all.

        adapters: whether every language's adapters stand in a file of their own too; None = as in the old folder.
        told: lines for its card.
        """
        opened = self.opened
        folder = opened.where if opened.where.is_dir() else opened.where.parent
        check_apart(out, folder, *(self.languages.merged if self.languages else ()))
        with tempfile.TemporaryDirectory() as files:
            self.new.save(files)
            shapes = shapes_of(self.model, opened.head, pooler="pooler.dense.weight" in opened.shapes)
            writer = hub_writer(
                out,
                self.model,
                shapes,
                files,
                precision(opened.dtype),
                head=opened.head,
                adapters=(folder / ADAPTERS).is_dir() if adapters is None else adapters,
                tokens_seen=_tokens_seen(folder / ADAPTERS, self.model.languages)
                | (self.languages.tokens_seen if self.languages else {}),
            )
            card = extension_card(Path(out).name, opened, self.model, told)
            return write_alone(writer, partial(self.pieces, self.rows()), card)


def extend_vocabulary(
    folder: str | Path,
    out: str | Path,
    changes: VocabularyChanges,
    tell: Callable[[str], None] = log.info,
    languages: Extension | None = None,
    adapters: bool | None = None,
) -> Path:
    """Write the Hub folder `out`, `folder` with another vocabulary, and tell what was done and measured.

    languages: as in plan_vocabulary. adapters: as in VocabularyExtension.write.
    ValueError in one line, with nothing written, for what cannot be done.
    """
    made = plan_vocabulary(folder, changes, tell, languages)
    told = [] if languages is None else [*languages.told]
    for line in made.told():
        tell(line)
        told.append(line)
    return made.write(out, adapters, told)


def plan_vocabulary(
    folder: str | Path,
    changes: VocabularyChanges,
    tell: Callable[[str], None] = log.info,
    languages: Extension | None = None,
) -> VocabularyExtension:
    """The new folder that `changes` make of an old one; nothing is written, of tensors nothing is read.

    languages: what is to become of the same folder's languages besides.
    """
    _check(changes)
    opened = open_hub_folder(folder) if languages is None else languages.opened
    old = _old_tokenizer(opened)
    texts = None
    if changes.corpus is not None:
        old_languages = opened.model.languages
        texts = read_texts(
            changes.corpus,
            changes.language,
            changes.old_shards,
            old_languages,
            old_characters=changes.old_characters,
            seed=changes.seed,
        )
    left_out: list[str] = []
    if changes.tokenizer is not None:
        new = _sentencepiece(Path(changes.tokenizer))
    else:
        assert texts is not None
        new, left_out = _with_pieces(old, texts, changes, tell)
    of_ids_V = sources(old, new)
    source_V = with_padding(of_ids_V, old, opened.model)
    mixtures = None
    if changes.rows != "random":
        training = [] if texts is None else texts.training
        mixtures = mixtures_of(old, new, of_ids_V, training, likeness=changes.rows == "mixture")
    return VocabularyExtension(opened, languages, old, new, changes, texts, source_V, mixtures, left_out)


def _with_pieces(
    old: SentencePieceTokenizer, texts: Texts, changes: VocabularyChanges, tell: Callable[[str], None]
) -> tuple[SentencePieceTokenizer, list[str]]:
    """The old tokenizer with new pieces, and those left out."""
    old_text = [text for documents in texts.old.values() for text in documents] if changes.protect else []
    if changes.protect and not old_text:
        raise ValueError(
            f"--protect has no text of old languages to protect: {changes.corpus} has only the new one; "
            "name a folder of their shards with --old-shards"
        )
    candidates = learn_candidates(old, texts.training, changes.pieces)
    choice = choose_pieces(old, candidates, texts.training, changes.pieces, old_text)
    if not choice.pieces:
        raise ValueError(
            f"{changes.corpus} yields no piece that the tokenizer lacks; give more text, or no --add-pieces"
        )
    if len(choice.pieces) < changes.pieces:
        tell(f"the text yields {len(choice.pieces):,} new pieces of the {changes.pieces:,} asked for")
    return choice.tokenizer, choice.left_out


def _check(changes: VocabularyChanges) -> None:
    """ValueError for wishes that do not go together."""
    if changes.rows not in ROWS:
        raise ValueError(f"rows={changes.rows!r} is not known; use one of {', '.join(ROWS)}")
    if changes.old_characters < 1:
        raise ValueError(f"--old-characters {changes.old_characters} must be at least 1; 500000 is the default")
    if changes.tokenizer is None:
        if changes.corpus is None:
            raise ValueError("neither a tokenizer nor a corpus is given; use --tokenizer NEW or --add-pieces CORPUS")
        if changes.pieces < 1:
            raise ValueError(f"--pieces {changes.pieces} must be at least 1; 5000 is usual for a language")
    else:
        if changes.pieces:
            raise ValueError("--tokenizer is taken as it is; leave out --pieces, or --tokenizer")
        if changes.protect:
            raise ValueError("--protect chooses among new pieces, and --tokenizer is taken as it is; leave one out")
    if changes.corpus is None and (changes.language or changes.old_shards is not None):
        raise ValueError("--language and --old-shards go with a corpus; name text of the new language by --add-pieces")
    for path in (changes.tokenizer, changes.corpus, changes.old_shards):
        if path is not None and not Path(path).exists():
            raise ValueError(f"{path} does not exist; check the path")


def _old_tokenizer(opened: HubFolder) -> SentencePieceTokenizer:
    folder = opened.where if opened.where.is_dir() else opened.where.parent
    tokenizer = _sentencepiece(folder)
    if tokenizer.vocab_size > opened.model.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, vocab_size is {opened.model.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def _sentencepiece(folder: Path) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(
            f"{folder} has a byte-level BPE, whose merges have no scores to put new pieces among; "
            "only SentencePiece tokenizers (xlm-roberta, xlm-roberta-xl, xmod) can be extended"
        )
    try:
        tokenizer.parsed()  # before an hour of learning
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return tokenizer


def _tokens_seen(folder: Path, languages: Sequence[str]) -> dict[str, int]:
    """What the adapter files in a folder say of these languages."""
    files = {code: folder / f"{code}.safetensors" for code in languages}
    found = {
        code: read_adapter_file(file).languages[code].tokens_seen for code, file in files.items() if file.is_file()
    }
    return {code: tokens for code, tokens in found.items() if tokens is not None}
