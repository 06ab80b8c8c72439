"""Values of TOML and JSON: whether one has the type that a field wants, how it is written, what else was meant."""

import difflib
import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list[str]: 'a list of strings, as ["en_XX", "de_DE"]',
    list[float]: "a list of numbers, as [0.9, 0.98]",
    list[list[float]]: "a list of pairs of numbers, as [[0, 0.3], [10000, 0.15]]",
    list[dict[str, Any]]: "a list of tables, as [{ step = 9000, alpha = 0.5 }]",
    dict[str, float]: "a table of numbers, as { en_XX = 1.0, de_DE = 2.5 }",
    dict[str, str]: 'a table of strings, as { "0" = "no", "1" = "yes" }',
    float | None: "a number",
}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of TOML or JSON has the field's type; an integer serves as a number, a bool never does."""
    if isinstance(kind, UnionType):  # of a type and None; in TOML, which has no None, the field is left out
        return value is None or any(fits(value, each) for each in get_args(kind) if each is not NoneType)
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(item, get_args(kind)[1]) for item in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def exact(value: Any, kind: Any) -> Any:
    """A fitting value in the field's own type: integers become floats where a number is wanted."""
    if value is None:
        return None
    if isinstance(kind, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is list:
        return [exact(item, get_args(kind)[0]) for item in value]
    if get_origin(kind) is dict:
        return {key: exact(item, get_args(kind)[1]) for key, item in value.items()}
    return float(value) if kind is float else value


def toml_value(value: Any) -> str:
    """`value` as it is written in TOML."""
    if isinstance(value, str):
        # A JSON string is a TOML string, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_value(key)} = {toml_value(item)}' for key, item in value.items())}}}"
    return repr(value)


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The way out of a wrong name: the known one most like it, or all known ones."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def multiples(value: int, of: int) -> str:
    """The multiples of `of` next to `value`, as words."""
    below, above = value // of * of, (value // of + 1) * of
    return f"{below} or {above}" if below else f"{above}"


def divisors(*numbers: int) -> list[int]:
    """What divides all of `numbers`, up to 64 (no tensor-parallel group is larger)."""
    return [d for d in range(1, 65) if all(n % d == 0 for n in numbers)]
