"""The configuration of a run, read and checked: load_config() shows all problems at once."""

import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from xlscale.config_deepspeed import deepspeed_problems, leaves, nested
from xlscale.config_rules import broken_rules, tensor_parallel_problem
from xlscale.config_rules_data import adapter_problems, routing_problem
from xlscale.config_sections import Config
from xlscale.config_values import TYPE_NAMES, divisors, exact, fits, multiples, nearest, toml_value


class ConfigError(ValueError):
    """What a person has to mend in a config: `problems`, each with the value, the rule and the way out."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


ENGINE = "deepspeed"
"""The one table that is not a section: its keys are the engine's."""
SECTIONS: dict[str, type] = {name: cls for name, cls in get_type_hints(Config).items() if name != ENGINE}
FIELDS: dict[str, Field[Any]] = {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in fields(cls)}
TYPES: dict[str, Any] = {f"{s}.{key}": t for s, cls in SECTIONS.items() for key, t in get_type_hints(cls).items()}


def check(config: Config) -> list[str]:
    """All rules that `config` breaks, one line each: value, rule, way out; empty when it is sound."""
    rules = [problem for _, problem in broken_rules(_flat(config))]
    return rules + [problem for _, problem in deepspeed_problems(dict(leaves(config.deepspeed)))]


def check_topology(config: Config, world_size: int) -> list[str]:
    """What forbids to run `config` on `world_size` processes, one line each; empty when nothing does."""
    problems = []
    tp = config.parallel.tensor_parallel
    model = config.model
    if model.languages:
        problems += adapter_problems(config.data.languages_per_micro_step, config.parallel.offload_optimizer)
    sizes = (model.num_attention_heads, model.intermediate_size)
    if problem := tensor_parallel_problem(tp, *sizes):
        problems.append(problem)
    if world_size % tp:
        problems.append(
            f"parallel.tensor_parallel = {tp} must divide the number of processes, {world_size}; "
            f"use one of {divisors(world_size, *sizes)}, or start {multiples(world_size, tp)} processes"
        )
        return problems
    dp = world_size // tp
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % (dp * micro):
        share = [d for d in range(1, whole // dp + 1) if whole % (dp * d) == 0]
        way = f"the nearest are {multiples(whole, dp * micro)}"
        if share:
            way += f", or micro_batch_size = {min(share, key=lambda d: (abs(d - micro), d))}"
        problems.append(
            f"training.global_batch_size = {whole} must be a multiple of {dp} data-parallel ranks x "
            f"micro_batch_size = {micro}, that is {dp * micro}; {way}"
        )
    elif problem := routing_problem(dp, micro, whole, config.data.language_run, config.data.languages_per_micro_step):
        problems.append(problem)
    return problems


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the TOML file `path`, applies overrides ("section.key=value") and checks everything.

    An override's value is TOML; what is not TOML is a string. Raises ConfigError with all problems at once,
    FileNotFoundError with what there is instead.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(_no_such_file(path))
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is not valid TOML: {error}; mend it there"]) from None
    given: dict[str, Any] = {}
    problems: list[str] = []
    for section, keys in raw.items():
        if section not in SECTIONS and section != ENGINE:
            problems.append(f"{path}: unknown section [{section}]{nearest(section, [*SECTIONS, ENGINE])}")
        elif not isinstance(keys, dict):
            problems.append(f"{path}: {section} = {keys!r} must be a section; write [{section}] above its keys")
        else:
            given |= {name: each for key, value in keys.items() for name, each in _parts(f"{section}.{key}", value)}
    sources = dict.fromkeys(given, str(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--set {override}: has no value; write --set section.key=value")
            continue
        for part, value in _parts(name.strip(), _override_value(name.strip(), text.strip())):
            given[part] = value
            sources[part] = f"--set {override}"
    values: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for name, value in given.items():
        if name.startswith(f"{ENGINE}."):
            engine[name.removeprefix(f"{ENGINE}.")] = value
        elif name not in FIELDS:
            problems.append(f"{sources[name]}: unknown key {name}{_nearest_key(name)}")
        elif not fits(value, TYPES[name]):
            problems.append(f"{sources[name]}: {name} = {value!r} must be {TYPE_NAMES[TYPES[name]]}")
        else:
            values[name] = exact(value, TYPES[name])
    for name, spec in FIELDS.items():
        if name in given:
            continue
        if spec.default is not MISSING:
            values[name] = spec.default
        elif spec.default_factory is not MISSING:
            values[name] = spec.default_factory()
        else:
            section, key = name.split(".")
            problems.append(f"{path}: {name} is missing and has no default; add `{key} = ...` under [{section}]")
    for names, problem in broken_rules(values):
        source = next((sources[n] for n in names if sources.get(n, "").startswith("--set")), str(path))
        problems.append(f"{source}: {problem}")
    problems += [f"{sources[f'{ENGINE}.{leaf}']}: {problem}" for leaf, problem in deepspeed_problems(engine)]
    if problems:
        raise ConfigError(problems)
    built = {s: {n.split(".")[1]: v for n, v in values.items() if n.startswith(f"{s}.")} for s in SECTIONS}
    sections: dict[str, Any] = {section: SECTIONS[section](**keys) for section, keys in built.items()}
    return Config(**sections, deepspeed=nested(engine))


def to_toml(config: Config) -> str:
    """The resolved config, every field that has a value, as TOML that load_config reads back to an equal Config."""
    blocks = []
    for section in SECTIONS:
        values = vars(getattr(config, section))
        blocks.append(
            "\n".join([f"[{section}]", *(f"{key} = {toml_value(v)}" for key, v in values.items() if v is not None)])
        )
    if config.deepspeed:
        blocks.append("\n".join([f"[{ENGINE}]", *(f"{key} = {toml_value(v)}" for key, v in config.deepspeed.items())]))
    return "\n\n".join(blocks) + "\n"


def _flat(config: Config) -> dict[str, Any]:
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in FIELDS}


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """A field is one value; what the engine gets is taken apart, so that every key has a source of its own."""
    in_engine = name.startswith(f"{ENGINE}.") and isinstance(value, dict) and value
    return list(leaves(value, name)) if in_engine else [(name, value)]


def _override_value(name: str, text: str) -> Any:
    """The value of an override: TOML, or the text itself where that is not TOML or a string is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if TYPES.get(name) is str and not isinstance(value, str) else value


def _nearest_key(name: str) -> str:
    """The key that was meant: of the same section if that exists, or the same key of another section."""
    section, _, key = name.partition(".")
    same_key = [known for known in FIELDS if known.endswith(f".{key or section}")]
    if same_key:
        return f"; did you mean {same_key[0]}?"
    if section in SECTIONS:
        return nearest(name, [known for known in FIELDS if known.startswith(f"{section}.")])
    return f"; the sections are {', '.join([*SECTIONS, ENGINE])}"


def _no_such_file(path: Path) -> str:
    folder = path.parent if any(path.parent.glob("*.toml")) else Path("configs")
    # data_*.toml are the recipes of data_pipelines
    there = sorted(str(p) for p in folder.glob("*.toml") if not p.name.startswith("data_"))
    way = f"there are {', '.join(there)}" if there else "give the path of a TOML file, as configs/demo.toml"
    return f"config file {path} does not exist; {way}"
