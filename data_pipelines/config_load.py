"""Reads a recipe's file; all of its problems are shown at once."""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data_pipelines.config import Recipe, RecipeError
from data_pipelines.config_rules import (
    CHOICES,
    CORPUS_STEPS,
    FILES,
    NUMBERS,
    PACKAGES,
    PAGE_STEPS,
    RANGES,
    REQUIRED,
    STEPS,
)
from data_pipelines.steps.thresholds import ThresholdError, numbers, thresholds
from xlscale.languages import language_id

SECTIONS: dict[str, type] = {name: cls for name, cls in get_type_hints(Recipe).items() if name != "steps"}
TYPES = {f"{name}.{key}": kind for name, cls in SECTIONS.items() for key, kind in get_type_hints(cls).items()}
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list[str]: "a list of strings"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the TOML file `path`, applies overrides ("section.key=value"); RecipeError lists all problems."""
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("data_*.toml"))
        raise RecipeError([f"recipe {path} does not exist; there are {', '.join(there) or 'none in configs/'}"])
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: is not valid TOML: {error}; mend it there"]) from None
    problems: list[str] = []
    given: dict[str, Any] = {}
    source: dict[str, str] = {}
    for section, keys in raw.items():
        if section == "steps":
            given["steps"] = keys
        elif not isinstance(keys, dict):
            problems.append(f"{path}: {section} stands outside of a section; write [section] above it")
        elif section not in SECTIONS:
            problems.append(f"{path}: unknown section [{section}]{_nearest(section, SECTIONS)}")
        else:
            given |= {f"{section}.{key}": value for key, value in keys.items()}
    source |= dict.fromkeys(given, str(path))
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            problems.append(f"--set {override}: has no value; write --set section.key=value")
            continue
        given[name], source[name] = _override_value(name, text), f"--set {override}"
    steps = given.pop("steps", list(STEPS))
    problems += [f"{source.get('steps', path)}: steps: {problem}" for problem in wrong_steps(steps)]
    for name, value in given.items():
        if name not in TYPES:
            problems.append(f"{source[name]}: unknown key {name}{_nearest(name, TYPES)}")
        elif not _fits(value, TYPES[name]):
            problems.append(f"{source[name]}: {name} = {value!r} must be {KINDS[TYPES[name]]}")
        elif name in RANGES and not RANGES[name][0] <= value <= RANGES[name][1]:
            low, high = RANGES[name]
            problems.append(f"{source[name]}: {name} = {value} must be from {low:g} to {high:g}")
        elif name in CHOICES:
            problems += [
                f"{source[name]}: {name} = {one!r} must be one of {', '.join(CHOICES[name])}"
                for one in (value if isinstance(value, list) else [value])
                if one not in CHOICES[name]
            ]
    problems += _missing(path, given)
    problems += [
        f"{source[name]}: {name} = {given[name]!r} is no file (from {Path.cwd()})"
        for name in FILES
        if isinstance(given.get(name), str) and given[name] and not Path(given[name]).is_file()
    ]
    problems += _wrong_thresholds(given)
    if given.get("tokenizer.kind") == "byte_bpe" and "tokenizer.character_coverage" in given:
        where = source["tokenizer.character_coverage"]
        problems.append(f"{where}: tokenizer.character_coverage has no effect on byte_bpe, which spells every character"
                        " by its bytes; leave it out")  # fmt: skip
    problems += [
        f"{source[name]}: {name} = {given[name]!r} needs the package {package}: pip install 'xlscale[{extra}]'"
        for (name, value), (package, extra) in PACKAGES.items()
        if given.get(name) and value in (None, given[name]) and not find_spec(package)
    ]
    if isinstance(steps, list) and "perplexity" in steps:
        problems += [
            f"{path}: the step 'perplexity' needs perplexity.{key}; give it, or take the step out"
            for key in ("models", "tokenizers", "cutoffs")
            if not given.get(f"perplexity.{key}")
        ]
    problems += _unknown_languages(given.get("identify.languages", []), source.get("identify.languages", ""))
    if problems:
        raise RecipeError(problems)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in given.items():
        section, key = name.split(".")
        values[section][key] = float(value) if TYPES[name] is float else value
    return Recipe(steps=tuple(steps), **{section: SECTIONS[section](**keys) for section, keys in values.items()})


def wrong_steps(steps: Any) -> list[str]:
    """What is wrong with a recipe's list of steps."""
    if not _fits(steps, list[str]):
        return [f"{steps!r} must be a list of strings"]
    known = ("read", *PAGE_STEPS, *CORPUS_STEPS)
    problems = [
        f"unknown step {name!r}{_nearest(name, known)}" for name in steps if name not in known and ":" not in name
    ]
    problems += [f"{name!r}: there is no file {name.rpartition(':')[0]} (from {Path.cwd()})"
                 for name in steps if ":" in name and not Path(name.rpartition(":")[0]).is_file()]  # fmt: skip
    problems += [f"{name!r} stands twice; once is enough" for name in dict.fromkeys(steps) if steps.count(name) > 1]
    problems += [
        f"{name!r} is missing; a recipe has {', '.join(REQUIRED)} at least" for name in REQUIRED if name not in steps
    ]
    if problems:
        return problems
    corpus = [name for name in steps if name in CORPUS_STEPS]
    if steps[0] != "read":
        problems.append(f"'read' must be the first, not {steps[0]!r}")
    if corpus != [name for name in CORPUS_STEPS if name in corpus]:
        problems.append(f"{', '.join(corpus)}: their order must be {', '.join(CORPUS_STEPS)}")
    if "identify" not in steps[: steps.index(corpus[0])]:
        problems.append(f"'identify' must stand before {corpus[0]!r}, which works language by language")
    after = [name for name in steps[steps.index("write") :] if name not in CORPUS_STEPS]
    problems += [f"{name!r} stands after 'write' and would see no document; put it before" for name in after]
    return problems


def _missing(path: Path, given: dict[str, Any]) -> list[str]:
    return [
        f"{path}: {section}.{spec.name} has no default and is missing; add `{spec.name} = ...` in [{section}]"
        for section, cls in SECTIONS.items()
        for spec in fields(cls)
        if f"{section}.{spec.name}" not in given and spec.default is MISSING and spec.default_factory is MISSING
    ]


def _unknown_languages(codes: Any, source: str) -> list[str]:
    problems = []
    for code in codes if isinstance(codes, list) else []:
        try:
            language_id(str(code))
        except ValueError as error:
            problems.append(f"{source}: identify.languages: {error}")
    return problems


def _wrong_thresholds(given: dict[str, Any]) -> list[str]:
    problems = []
    for name, ranges in NUMBERS.items():
        if isinstance(given.get(name), str) and Path(given[name]).is_file():
            try:
                numbers(given[name], ranges)
            except ThresholdError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
    return problems + _wrong_rules(given)


def _wrong_rules(given: dict[str, Any]) -> list[str]:
    path = given.get("filter.thresholds")
    if not path or not isinstance(path, str):
        return []
    if not given.get("filter.rules"):
        return [f"filter.thresholds = {path!r} has no effect without filter.rules; name sets of rules there"]
    try:
        thresholds(path)
    except ThresholdError as error:
        return error.problems
    return []


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is close to a known one, by itself or by its last part."""
    names = list(known)
    same_key = [other for other in names if other.partition(".")[2] == name.partition(".")[2] != ""]
    close = same_key or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _override_value(name: str, text: str) -> Any:
    if TYPES.get(name) is str:
        return text.strip("\"'")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
