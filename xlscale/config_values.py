"""Whether a value of TOML or JSON has the type that a field wants."""

from types import NoneType, UnionType
from typing import Any, get_args, get_origin

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list[str]: 'a list of strings, as ["en_XX", "de_DE"]',
    list[float]: "a list of numbers, as [0.9, 0.98]",
    dict[str, str]: 'a table of strings, as { "0" = "no", "1" = "yes" }',
    float | None: "a number",
}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of TOML or JSON has the field's type; an integer serves as a number, a bool never does."""
    if isinstance(kind, UnionType):  # of a type and None; in TOML, which has no None, the field is left out
        return value is None or any(fits(value, each) for each in get_args(kind) if each is not NoneType)
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
    return float(value) if kind is float else value
