"""What the adapters of a new language start from: a copy, the average of others, or the initial distribution."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xlscale.checkpoint.adapter_file import LanguageAdapters, adapter_names, adapter_shapes
from xlscale.config_sections import ModelConfig
from xlscale.config_values import nearest
from xlscale.models.init import initial_rows

FORMS = "copy:xx_YY, average:aa_BB,cc_DD or random[:SEED]"


def inits_of(added: Sequence[str], inits: Sequence[str]) -> dict[str, str]:
    """New language -> its init, of options as "average:en_XX,fr_XX" (all languages) or "sw_KE=copy:en_XX" (one)."""
    for language in added:
        if added.count(language) > 1:
            raise ValueError(f"--add {language} is given twice; give it once")
    own = {}
    for text in inits:
        language, equals, init = text.partition("=")
        language, init = (language, init) if equals else ("", text)
        if language and language not in added:
            raise ValueError(f"--init {text} is for {language}, which is not added; say --add {language} too")
        if language in own:
            raise ValueError(f"--init is given twice for {language or 'all languages'}; give it once, or as LANG=...")
        own[language] = init
    if inits and not added:
        raise ValueError(f"--init {inits[0]} is for new languages; say which by --add")
    without = [language for language in added if language not in own and "" not in own]
    if without:
        raise ValueError(f"--add {without[0]} needs --init: {FORMS}")
    return {language: own.get(language, own.get("", "")) for language in added}


def initial_adapters(
    init: str, language: str, model: ModelConfig, given: Mapping[str, LanguageAdapters]
) -> LanguageAdapters:
    """The adapters that an init makes of the given languages'; they have seen no tokens of the new one."""
    kind, _, rest = init.partition(":")
    codes = rest.split(",")
    if kind == "random" and re.fullmatch(r"(:\d{1,18})?", init.removeprefix("random")):
        return _drawn(language, model, int(rest or 0))
    if kind not in ("copy", "average") or not all(codes) or (kind == "copy" and len(codes) > 1):
        raise ValueError(f"--init {init} for {language} is none of {FORMS}")
    for code in codes:
        if code not in given:
            raise ValueError(f"--init {init} for {language}: there is no {code!r}{nearest(code, list(given))}")
        if codes.count(code) > 1:
            raise ValueError(f"--init {init} for {language} names {code} twice; name it once")
    if len(codes) == 1:
        return replace(given[codes[0]], where=language, tokens_seen=0)
    return _mean(language, [given[code] for code in codes])


def _mean(language: str, of: Sequence[LanguageAdapters]) -> LanguageAdapters:
    def rows(name: str, start: int, stop: int) -> Tensor:
        total = of[0].rows(name, start, stop).double()
        for other in of[1:]:
            total += other.rows(name, start, stop)
        return (total / len(of)).float()

    return LanguageAdapters(language, torch.float32, of[0].shapes, rows, 0)


def _drawn(language: str, model: ModelConfig, seed: int) -> LanguageAdapters:
    ours = {theirs: name for name, theirs in adapter_names(model, language).items()}
    shapes = adapter_shapes(model, language)

    def rows(name: str, start: int, stop: int) -> Tensor:
        return initial_rows(ours[name], shapes[name], model, seed, start, stop)

    return LanguageAdapters(language, torch.float32, shapes, rows, 0)
