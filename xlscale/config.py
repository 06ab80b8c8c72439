"""The configuration of a run: one dataclass per TOML section; load_config() shows all problems at once."""

import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from xlscale.config_rules import (
    broken_rules,
    divisors,
    multiples,
    nearest,
    tensor_parallel_problem,
    toml_value,
)


class ConfigError(ValueError):
    """What a person has to mend in a config: `problems`, each with the value, the rule and the way out."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run: the name of its folder, and of the run in wandb."""
    dir: str = "runs"
    """Folder that holds the run folders; relative to where the command is started."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    seed: int = 0
    """Key of every random decision: initial weights, order of the samples, masks, dropout."""
    total_steps: int
    """Updates of the whole run; the learning rate's decay ends here."""
    global_batch_size: int
    """Sequences of one update, over all processes and micro-steps; the same at any world size."""
    micro_batch_size: int
    """Sequences of one forward and backward of one data-parallel rank; as many as memory holds."""
    precision: str = "bf16"
    """Number format of forward and backward, "bf16" or "fp32"; weights and moments are fp32 in both."""
    max_grad_norm: float = 0.0
    """Gradients are scaled down to this global L2 norm; 0 = no clipping, as RoBERTa."""
    max_skipped_updates: int = 20
    """The run stops after so many updates in a row that were skipped for a gradient that is not finite."""
    init_from: str = ""
    """Hub folder whose weights the run starts from; "" = drawn from the seed."""
    threads: int = 0
    """CPU threads of torch in each process; 0 = the machine's cores divided by its processes."""
    stop_after: int = 0
    """Stop with a checkpoint once so many updates are done, in an unchanged schedule; 0 = at total_steps."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_parallel: int = 1
    """Processes that share each layer's matrices; the rest of the world is data-parallel."""
    zero_stage: int = 3
    """What DeepSpeed spreads over the data-parallel ranks: 1 optimizer, 2 and gradients, 3 and weights."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model_type: str
    """Family as the Hub names it: "xlm-roberta-xl" (pre-LN), "xlm-roberta", "roberta" (post-LN), "xmod" (adapters)."""
    vocab_size: int
    """Rows of the word embedding; at least the tokenizer's ids, the rest is padding that is never sampled."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of encoder layers."""
    num_attention_heads: int
    """Heads of each attention; the head dimension is hidden_size / num_attention_heads."""
    intermediate_size: int
    """Width inside the feed-forward network, four times hidden_size in all published shapes."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward network and of the adapters: "gelu" (erf), "gelu_new" (tanh), "relu" or "silu"."""
    hidden_dropout_prob: float = 0.1
    """Dropout on the embeddings and on what each sublayer adds to the residual stream."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on the attention weights."""
    classifier_dropout: float | None = None
    """Dropout in the classification heads; left out = hidden_dropout_prob."""
    max_position_embeddings: int = 514
    """Rows of the position embedding: the first token is at pad_token_id + 1, so 514 rows mean 512 tokens."""
    type_vocab_size: int = 1
    """Rows of the token type embedding; every id used is 0 unless token_type_ids are given."""
    position_embedding_type: str = "absolute"
    """"absolute", or distances inside every attention, "relative_key" or "relative_key_query" (transformers 4 only)."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights of linear layers and embeddings."""
    pad_token_id: int = 1
    """Id that fills short sequences; its embedding row stays zero."""
    bos_token_id: int = 0
    """Id of <s>, the first token of every sequence."""
    eos_token_id: int = 2
    """Id of </s>, the last token of every document."""
    is_decoder: bool = False
    """A token attends to itself and to what stands before it only."""
    add_cross_attention: bool = False
    """Every layer of a decoder also attends to the states of another encoder."""
    use_cache: bool = True
    """Whether a decoder gives its keys and values back by default, for generation."""
    languages: list[str] = field(default_factory=list)
    """Languages that have an adapter in every layer, xmod only; a language's id is its place here."""
    default_language: str = ""
    """Language of a sample that comes without a language id, xmod only; "" = every sample must have one."""
    pre_norm: bool = False
    """A sublayer normalises its input, and a LayerNorm follows the last layer; xmod only, others follow the family."""
    adapter_reduction_factor: int = 2
    """hidden_size divided by the width inside an adapter."""
    adapter_layer_norm: bool = False
    """A LayerNorm of its own, shared by all languages of a layer, stands before the adapter."""
    adapter_reuse_layer_norm: bool = True
    """Without it, the feed-forward network's LayerNorm stands there too."""
    ln_before_adapter: bool = True
    """That LayerNorm comes before the residual branches off, not only on the adapter's input."""
    num_labels: int = 2
    """Classes of the classification heads."""
    id2label: dict[str, str] = field(default_factory=dict)
    """Name of every class by its number, as {"0" = "no", "1" = "yes"}; empty = LABEL_0 and so on."""
    problem_type: str = ""
    """"regression", "single_label_classification" or "multi_label_classification"; "" = by the labels given."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str
    """Folder of the text shards, one folder per language, as data_pipelines writes it."""
    tokenizer: str
    """Folder of the tokenizer, laid out as on the Hub."""
    sequence_length: int = 512
    """Tokens of every sample, <s> included."""
    sampling_alpha: float = 0.3
    """p(language) ~ n_language ** alpha: 1.0 follows the corpus, lower favours small languages."""
    languages: list[str] = field(default_factory=list)
    """Languages to train on, by the codes of xlscale/languages.py; empty = all that the shards hold."""
    cache: str = ""
    """Folder of the token shards derived from the text shards; "" = the folder `tokens` beside the shards."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    mlm_probability: float = 0.15
    """Probability that a token is to be predicted."""
    mask_fraction: float = 0.8
    """Fraction of the predicted tokens that are replaced by <mask>."""
    random_fraction: float = 0.1
    """Fraction of the predicted tokens that are replaced by a random piece; the rest keeps its token."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float
    """Peak learning rate of AdamW, reached at the end of the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and LayerNorms have none."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    warmup_steps: int
    """Updates in which the learning rate rises linearly from 0 to its peak."""
    decay: str = "linear"
    """How it falls from the peak to the end: a key of DECAYS in xlscale/training/schedule.py."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000
    """Updates between two checkpoints; 0 = only at the end."""
    keep: int = 2
    """How many checkpoints are kept, the newest; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    every: int = 0
    """Updates between two exports into <run>/hub/step-XXXXXXXX; 0 = only at the end."""
    dtype: str = "fp32"
    """Number format of the exported weights, "fp32" or "bf16"."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    wandb: str = "offline"
    """"offline" writes wandb files into the run folder, "online" sends them, "disabled" does neither."""
    wandb_project: str = "xlscale"
    """Project of the run in wandb."""
    every: int = 1
    """Updates between two log lines; metrics.jsonl has every update all the same."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig
    data: DataConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_dir(self) -> Path:
        """The run's folder, <run.dir>/<run.name>."""
        return Path(self.run.dir) / self.run.name


SECTIONS: dict[str, type] = get_type_hints(Config)
FIELDS: dict[str, Field[Any]] = {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in fields(cls)}
TYPES: dict[str, Any] = {f"{s}.{key}": t for s, cls in SECTIONS.items() for key, t in get_type_hints(cls).items()}
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


def check(config: Config) -> list[str]:
    """All rules that `config` breaks, one line each: value, rule, way out; empty when it is sound."""
    return [problem for _, problem in broken_rules(_flat(config))]


def check_topology(config: Config, world_size: int) -> list[str]:
    """What forbids to run `config` on `world_size` processes, one line each; empty when nothing does."""
    problems = []
    tp = config.parallel.tensor_parallel
    model = config.model
    if model.languages:  # all samples would go through the default language's adapter, in silence
        problems.append(
            f'model.model_type = "{model.model_type}" cannot be trained yet: the stream does not tell the model the '
            "language of a sample; train another family"
        )
    sizes = (model.num_attention_heads, model.intermediate_size, model.vocab_size)
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
        if section not in SECTIONS:
            problems.append(f"{path}: unknown section [{section}]{nearest(section, SECTIONS)}")
        elif not isinstance(keys, dict):
            problems.append(f"{path}: {section} = {keys!r} must be a section; write [{section}] above its keys")
        else:
            given |= {f"{section}.{key}": value for key, value in keys.items()}
    sources = dict.fromkeys(given, str(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--set {override}: has no value; write --set section.key=value")
            continue
        given[name.strip()] = _override_value(name.strip(), text.strip())
        sources[name.strip()] = f"--set {override}"
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in FIELDS:
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
    if problems:
        raise ConfigError(problems)
    built = {s: {n.split(".")[1]: v for n, v in values.items() if n.startswith(f"{s}.")} for s in SECTIONS}
    return Config(**{section: SECTIONS[section](**keys) for section, keys in built.items()})


def to_toml(config: Config) -> str:
    """The resolved config, every field that has a value, as TOML that load_config reads back to an equal Config."""
    blocks = []
    for section in SECTIONS:
        values = vars(getattr(config, section))
        blocks.append(
            "\n".join([f"[{section}]", *(f"{key} = {toml_value(v)}" for key, v in values.items() if v is not None)])
        )
    return "\n\n".join(blocks) + "\n"


def _flat(config: Config) -> dict[str, Any]:
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in FIELDS}


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
    return f"; the sections are {', '.join(SECTIONS)}"


def _no_such_file(path: Path) -> str:
    folder = path.parent if any(path.parent.glob("*.toml")) else Path("configs")
    # data_*.toml are the recipes of data_pipelines
    there = sorted(str(p) for p in folder.glob("*.toml") if not p.name.startswith("data_"))
    way = f"there are {', '.join(there)}" if there else "give the path of a TOML file, as configs/demo.toml"
    return f"config file {path} does not exist; {way}"
