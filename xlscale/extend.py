"""Languages of an X-MOD model: merged, renamed, added, pruned, taken out; from Hub folder to Hub folder.

The plan reads names and facts only; every tensor then goes from the folders to the new one a few rows at a time. What
is not a language's own, and every language that is kept, has the same bits afterwards.
"""

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from xlscale.checkpoint.adapter_file import (
    ADAPTERS,
    AdapterSource,
    LanguageAdapters,
    adapter_names,
    check_ours,
    open_adapters,
    write_adapter_file,
)
from xlscale.checkpoint.card import header
from xlscale.checkpoint.hub import hub_writer, write_alone
from xlscale.checkpoint.hub_folder import HubFolder, with_changes
from xlscale.checkpoint.hub_names import shapes_of
from xlscale.checkpoint.importers import tokenizer_folder
from xlscale.checkpoint.trunk import KNOWN, finest, mismatch, pieces_of, precision
from xlscale.config_sections import ModelConfig
from xlscale.config_values import nearest
from xlscale.extend_init import initial_adapters, inits_of

log = logging.getLogger(__name__)

WAY_OUT = "give one of type xmod, or an adapter file"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is asked for, in the order in which it is done."""

    merge: Sequence[Path] = ()
    """Hub folders or adapter files on the same trunk, whose languages come in."""
    rename: Sequence[str] = ()
    """OLD=NEW each."""
    add: Sequence[str] = ()
    """New languages."""
    init: Sequence[str] = ()
    """What they start from: copy:LANG, average:LANG,LANG or random[:SEED], for all, or as NEW=copy:LANG for one."""
    prune: Sequence[str] = ()
    """Languages that go."""
    default: str = ""
    """The default language from now on; "" = as it is."""

    @property
    def some(self) -> bool:
        """Whether there is anything to do."""
        return any(vars(self).values())


@dataclass
class Extension:
    """A folder as it will be: where the adapters of every language come from."""

    source: AdapterSource
    opened: HubFolder
    languages: dict[str, LanguageAdapters]
    """In the order of their ids."""
    default: str
    merged: Sequence[Path] = ()
    """Folders and files beside the old folder that are read."""
    told: list[str] = field(default_factory=list)
    """What was done, a line each."""

    @property
    def model(self) -> ModelConfig:
        """Config of the new folder; ValueError for a language that has no place in one."""
        changes = {"languages": list(self.languages), "default_language": self.default}
        return with_changes(self.opened.model, changes)

    @property
    def tokens_seen(self) -> dict[str, int]:
        """Language -> tokens that its adapters were trained on, where it is known."""
        return {code: found.tokens_seen for code, found in self.languages.items() if found.tokens_seen is not None}

    @cached_property
    def _own(self) -> dict[str, tuple[str, str]]:
        """Our name of every adapter's parameter -> its language, and its name there."""
        return {
            ours: (language, theirs)
            for language in self.languages
            for ours, theirs in adapter_names(self.model, language).items()
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of a parameter of the new folder, a few at a time."""
        if name not in self._own:
            return pieces_of(self.opened, name)
        language, theirs = self._own[name]
        return self.languages[language].pieces(theirs)

    def write(self, out: str | Path, adapters: bool | None = None) -> Path:
        """Write the new Hub folder, whole or not at all.

        adapters: whether every language's adapters stand in a file of their own too; None = as in the old folder.
        """
        opened, model = self.opened, self.model
        folder = opened.where if opened.where.is_dir() else opened.where.parent
        check_apart(out, folder, *self.merged)
        with tempfile.TemporaryDirectory() as made:
            writer = hub_writer(
                out,
                model,
                shapes_of(model, opened.head, pooler="pooler.dense.weight" in opened.shapes),
                tokenizer_folder(folder, opened, Path(made)),
                precision(opened.dtype),
                head=opened.head,
                adapters=(folder / ADAPTERS).is_dir() if adapters is None else adapters,
                tokens_seen=self.tokens_seen,
            )
            return write_alone(writer, self.pieces, extension_card(Path(out).name, opened, model, self.told))

    def to_extract(self, folder: Path, only: Sequence[str] = ()) -> list[str]:
        """The languages, by default all, whose adapter files extract() would write; ValueError where it cannot."""
        for language in only:
            self.must_have(language, "to extract")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; name another one for the adapter files")
        wanted = [language for language in self.languages if not only or language in only]
        for language in wanted:
            check_ours(folder / f"{language}.safetensors")
        return wanted

    def extract(self, folder: Path, only: Sequence[str] = ()) -> list[Path]:
        """Write the adapter files of some languages, by default of all, into a folder; each whole or not at all."""
        wanted = self.to_extract(folder, only)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = precision(self.opened.dtype)
        return [
            write_adapter_file(folder, language, self.languages[language], self.source.trunk, dtype)
            for language in wanted
        ]

    def as_written(self, out: str | Path) -> "Extension":
        """The same languages as they stand in a folder written of them, which may have other embeddings."""
        made = plan(out, Changes())
        for code, found in self.languages.items():
            made.languages[code] = replace(made.languages[code], tokens_seen=found.tokens_seen)
        return made

    def must_have(self, language: str, what: str) -> None:
        """ValueError unless there is such a language."""
        if language not in self.languages:
            known = list(self.languages)
            raise ValueError(f"{self.opened.where} has no {language!r} {what}{nearest(language, known)}")

    def must_be_new(self, language: str, what: str) -> None:
        """ValueError if there is such a language."""
        if language in self.languages:
            raise ValueError(f"{self.opened.where} has {language} already; {what}")


def plan(folder: str | Path, changes: Changes) -> Extension:
    """The new folder that `changes` make of an old one; ValueError in one line for what cannot be done.

    Nothing is written, and of tensors only what a merge must compare is read.
    """
    source = open_adapters(Path(folder))
    if source.folder is None or not source.languages:
        kind = "one language's adapters" if source.folder is None else f"of type {source.folder.model.model_type}"
        raise ValueError(f"{folder} is {kind} and has no languages to add to or take from; give a folder of type xmod")
    opened = source.folder
    made = Extension(source, opened, dict(source.languages), opened.model.default_language, changes.merge)
    before = list(made.languages)
    for other in changes.merge:
        _merge(made, Path(other))
    renamed = {code: code for code in before}
    for text in changes.rename:
        old, new = _rename(made, text)
        renamed |= {first: new for first, last in renamed.items() if last == old}
    _add(made, changes)
    _prune(made, changes.prune)
    if changes.default:
        made.must_have(changes.default, "to be the default language")
        made.default = changes.default
        made.told.append(f"default language {made.default}")
    elif made.default and made.default not in made.languages:
        raise ValueError(
            f"{made.default} is the default language and would be pruned; say which shall be by --default, "
            f"as --default {next(iter(made.languages))}"
        )
    ids = {code: number for number, code in enumerate(made.languages)}
    moved = [
        f"{renamed[code]} {number} -> {ids[renamed[code]]}"
        for number, code in enumerate(before)
        if ids.get(renamed[code], number) != number
    ]
    if moved:
        made.told.append(f"ids that change: {', '.join(moved)}")
    _ = made.model  # its rules, before anything is written
    return made


def _merge(made: Extension, other: Path) -> None:
    found = open_adapters(other)
    if not found.languages:
        assert found.folder is not None
        raise ValueError(f"{other} is of type {found.folder.model.model_type} and has no languages; {WAY_OUT}")
    if refusal := mismatch(str(other), found.trunk, made.source.trunk):
        raise ValueError(refusal)
    new, same = [], []
    for language, adapters in found.languages.items():
        if language not in made.languages:
            made.languages[language] = adapters
            new.append(f"{language} (id {len(made.languages) - 1})")
        elif _identical(made.languages[language], adapters):
            same.append(language)
        else:
            raise ValueError(
                f"{language} is in both {made.opened.where} and {other}, and not the same; "
                f"prune it from one of them, or rename it there by xlscale extend --rename {language}=NEW"
            )
    told = f"merged {other.name}: {', '.join(new) or 'nothing new'}"
    if same:
        told += f"; the same in both: {', '.join(same)}"
    target = precision(made.opened.dtype)
    if new and target != "fp32" and precision(next(iter(found.languages.values())).dtype) != target:
        told += f"; rounded to {target}"
    made.told.append(told)


def _identical(one: LanguageAdapters, other: LanguageAdapters) -> bool:
    """Whether they have the same values in the finest number format that both know."""
    kind = finest(KNOWN[precision(one.dtype)], KNOWN[precision(other.dtype)])
    return kind is not None and one.digests((kind,)) == other.digests((kind,))


def _rename(made: Extension, text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise ValueError(f"--rename {text} must be OLD=NEW, as de_XX=de_DE")
    made.must_have(old, "to rename")
    made.must_be_new(new, f"rename {old} to another code")
    made.languages = {new if code == old else code: found for code, found in made.languages.items()}
    made.default = new if made.default == old else made.default
    made.told.append(f"renamed {old} to {new}")
    return old, new


def _add(made: Extension, changes: Changes) -> None:
    given = dict(made.languages)
    for language, init in inits_of(changes.add, changes.init).items():
        made.must_be_new(language, "leave it out of --add, or prune the old one in a run before")
        one = with_changes(made.opened.model, {"languages": [language], "default_language": ""})
        made.languages[language] = initial_adapters(init, language, one, given)
        made.told.append(f"added {language} (id {len(made.languages) - 1}): {init}")


def _prune(made: Extension, languages: Sequence[str]) -> None:
    for language in languages:
        made.must_have(language, "to prune")
        del made.languages[language]
    if not made.languages:
        raise ValueError(f"--prune {','.join(languages)} leaves no language; keep one")
    if languages:
        made.told.append(f"pruned {', '.join(languages)}; {len(made.languages)} languages stay")


def listed(text: str) -> list[str]:
    """The codes of a text such as "de_DE,fr_XX"."""
    return [code for code in re.split(r"[,\s]+", text) if code]


def check_apart(out: str | Path, *read: Path) -> None:
    """ValueError for a folder to be written that is also read: it would be replaced."""
    if Path(out).resolve() in [path.resolve() for path in read]:
        raise ValueError(f"{out} is a folder that is read; name another one to write")


def extension_card(name: str, opened: HubFolder, model: ModelConfig, told: Sequence[str]) -> str:
    """The card of a folder made of an old one by the lines of `told`."""
    lines = [
        *header(model.model_type, model.languages),
        f"# {name}",
        "",
        f"{opened.where.resolve().name} with other languages or pieces, by xlscale extend. Nothing was trained: what "
        "was added starts from what stands here, all else has the values that it had.",
        "",
        *(f"- {line}" for line in told),
        "",
    ]
    return "\n".join(lines)
