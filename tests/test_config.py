"""xlscale/config.py: every problem is shown, with value, rule and way out; what is sound round-trips."""

import ast
import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlscale import config_sections as module
from xlscale.config import FIELDS, SECTIONS, ConfigError, check, check_topology, load_config, to_toml
from xlscale.config_rules import ABOVE_ZERO, AT_LEAST, BETWEEN, CHOICES, CROSS_RULES, NOT_EMPTY
from xlscale.config_sections import Config
from xlscale.training.schedule import DECAYS

SMALL = """
[training]
total_steps = 20
global_batch_size = 8
micro_batch_size = 2
[model]
model_type = "xlm-roberta-xl"
vocab_size = 800
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 64
[data]
shards = "shards"
tokenizer = "tokenizer"
[optimizer]
learning_rate = 1e-3
[schedule]
warmup_steps = 2
"""
# data_*.toml are the recipes of data_pipelines.
FOLDER = Path(__file__).parents[1] / "configs"
OPTIONAL = {name for name, spec in FIELDS.items() if spec.default is None}
CONFIGS = sorted(path for path in FOLDER.glob("*.toml") if not path.name.startswith("data_"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_fields_without_a_value_take_their_defaults(small: Path) -> None:
    config = load_config(small)
    assert config.data.sampling_alpha == 0.3
    assert config.optimizer.betas == [0.9, 0.98]
    assert config.run_dir == Path("runs/run")
    assert check(config) == []


def test_an_override_wins_over_the_file_and_takes_the_type_of_its_field(small: Path) -> None:
    config = load_config(
        small,
        [
            "training.total_steps=200",
            "run.name=007",
            "data.languages=['de_DE']",
            "optimizer.learning_rate = 1",
        ],
    )
    assert config.training.total_steps == 200
    assert config.run.name == "007"
    assert config.data.languages == ["de_DE"]
    assert isinstance(config.optimizer.learning_rate, float)


def test_a_misspelt_key_is_refused_with_the_key_that_was_meant(small: Path) -> None:
    assert problems_of(small, "training.total_step=5")[0] == (
        "--set training.total_step=5: unknown key training.total_step; did you mean training.total_steps?"
    )
    assert "did you mean optimizer.learning_rate?" in problems_of(small, "training.learning_rate=5")[0]
    assert "did you mean data.sampling_alpha?" in problems_of(small, "sampling_alpha=5")[0]
    small.write_text(SMALL + "[modle]\nx = 1\n[optimiser]\nlearning_rate = 1\n", encoding="utf-8")
    first, second = problems_of(small)
    assert "[modle]; did you mean model?" in first and "[optimiser]; did you mean optimizer?" in second


def test_all_problems_are_shown_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        SMALL.replace("total_steps = 20", "total_steps = true")
        .replace("learning_rate = 1e-3", "learning_rates = 1e-3")
        .replace("num_attention_heads = 4", "num_attention_heads = 5"),
        encoding="utf-8",
    )
    problems = problems_of(path, "parallel.tensor_parallel=0", "nonsense")
    assert len(problems) == 6
    text = "\n".join(problems)
    for part in (
        "training.total_steps = True must be an integer",
        "unknown key optimizer.learning_rates; did you mean optimizer.learning_rate?",
        "optimizer.learning_rate is missing and has no default; add `learning_rate = ...` under [optimizer]",
        "num_attention_heads = 5 must divide hidden_size = 32",
        "parallel.tensor_parallel = 0 is too small; use 1 or more",
        "--set nonsense: has no value; write --set section.key=value",
    ):
        assert part in text
    assert all(line.startswith((str(path), "--set")) for line in problems)


@pytest.mark.parametrize(
    ("override", "rule", "way"),
    [
        ("training.global_batch_size=9", "must be a multiple of micro_batch_size = 2", "8 or 10"),
        ("parallel.tensor_parallel=3", "must divide num_attention_heads = 4", "[1, 2, 4]"),
        ("schedule.warmup_steps=21", "is more than training.total_steps = 20", "at most 20"),
        ("data.sequence_length=513", "more than the 512 tokens", "model.max_position_embeddings = 515"),
        ("masking.random_fraction=0.3", "must not add up to more than 1", "0.8 and 0.1"),
        ("masking.mlm_probability=1", "above 0.0 and below 1.0", "0.15"),
        ("optimizer.betas=[0.9]", "two numbers", "[0.9, 0.98]"),
        ("optimizer.learning_rate=nan", "not finite", "a number"),
        ("optimizer.learning_rate=0", "above 0", "positive"),
        ("model.hidden_dropout_prob=1.0", "below 1.0", "0.1"),
        ("model.eos_token_id=1", "three ids", "1, 0 and 2"),
        ("run.name=a/b", "one folder's name", "run.dir"),
        ("run.name=..", "one folder's name", "run.dir"),
        ("run.name=", "must not be empty", "[run]"),
        ("training.precision=fp16", "must be one of", '"bf16", "fp32"'),
        ("schedule.decay=inverse", "must be one of", '"linear"'),
        ("data.languages=['de_DE','de_DE']", "more than once", "de_DE"),
        ("training.total_steps=1e3", "must be an integer", "1000.0"),
        ("data.languages=de_DE", "must be a list of strings", '["en_XX", "de_DE"]'),
        ("model.hidden_act=mish", "must be one of", '"gelu_new"'),
        ("model.position_embedding_type=rotary", "must be one of", '"relative_key"'),
        ("model.problem_type=ranking", "must be one of", '"regression"'),
        ("model.classifier_dropout=1", "below 1.0", "0.1"),
        ("model.classifier_dropout=high", "must be a number", "'high'"),
        ("model.add_cross_attention=true", "for decoders only", "is_decoder = true"),
        ("model.languages=['de_DE']", 'for model_type = "xmod" only', "leave it out"),
        ("model.pre_norm=true", 'for model_type = "xmod" only', "leave it out"),
        ("model.ln_before_adapter=false", 'for model_type = "xmod" only', "leave it out"),
        ("model.num_labels=0", "too small", "1 or more"),
        ("model.id2label={'0' = 'no', '2' = 'yes'}", "not those of num_labels = 2", 'name "0" to "1"'),
        ("model.id2label=['no']", "must be a table of strings", '"0" = "no"'),
    ],
)
def test_a_broken_rule_names_the_value_the_rule_and_the_way_out(
    small: Path, override: str, rule: str, way: str
) -> None:
    (line,) = problems_of(small, override)
    assert rule in line and way in line and "\n" not in line
    assert override.partition("=")[0] in line


XMOD = ["model.model_type=xmod", "model.languages=['en_XX', 'de_DE']"]


@pytest.mark.parametrize(
    ("override", "rule", "way"),
    [
        ("model.languages=[]", "gives no adapter", '["en_XX", "de_DE"]'),
        ("model.languages=['pop']", '"pop" is not a code', "de_DE"),
        ("model.languages=['en_XX', 'de.DE']", '"de.DE" is not a code', "de_DE"),
        ("model.languages=['en_XX', 'en_XX']", "en_XX more than once", "once"),
        ("model.default_language=fr_XX", 'default_language = "fr_XX" has no adapter', "en_XX, de_DE"),
        ("model.adapter_reduction_factor=64", "more than hidden_size = 32", "2 or 4"),
    ],
)
def test_a_broken_rule_of_adapters(small: Path, override: str, rule: str, way: str) -> None:
    (line,) = problems_of(small, *XMOD, override)
    assert rule in line and way in line and "\n" not in line


def test_an_adapter_that_does_not_split_over_the_ranks_is_refused(small: Path) -> None:
    assert load_config(small, XMOD).model.languages == ["en_XX", "de_DE"]
    (line,) = problems_of(small, *XMOD, "model.adapter_reduction_factor=3", "parallel.tensor_parallel=4")
    assert "makes adapters 10 wide" in line and "use one of [2, 4, 8, 1]" in line


def test_training_adapters_needs_languages_that_all_ranks_share_and_gradients_that_can_be_cleared(small: Path) -> None:
    routed = [*XMOD, "data.languages_per_micro_step=1", "data.language_run=8"]
    sizes = ["training.global_batch_size=16", "training.micro_batch_size=8"]
    assert check_topology(load_config(small, [*routed, *sizes]), 1) == []
    (line,) = check_topology(load_config(small, [*XMOD, *sizes]), 1)
    assert "data.languages_per_micro_step = 0" in line and "set it to 1" in line
    (line,) = check_topology(load_config(small, [*routed, *sizes, "parallel.offload_optimizer=cpu"]), 1)
    assert "use none" in line
    (line,) = check_topology(load_config(small, [*routed, *sizes]), 2)
    assert line.endswith("the nearest micro_batch_size is 4")


def test_optional_fields_and_tables_go_through_toml(small: Path) -> None:
    config = load_config(small, ["model.classifier_dropout=0", "model.id2label={'0' = 'nein \"', '1' = 'ja'}"])
    assert config.model.classifier_dropout == 0.0 and isinstance(config.model.classifier_dropout, float)
    assert load_config(small).model.classifier_dropout is None
    for resolved in (config, load_config(small)):
        small.with_name("again.toml").write_text(to_toml(resolved), encoding="utf-8")
        assert load_config(small.with_name("again.toml")) == resolved


def test_a_vocabulary_that_does_not_divide_is_no_problem(small: Path) -> None:
    assert load_config(small, ["parallel.tensor_parallel=4", "model.vocab_size=802"]).model.vocab_size == 802


def test_tokens_that_cannot_be_split_offloading_that_cannot_work_and_a_spike_of_nothing_are_refused(
    small: Path,
) -> None:
    (line,) = problems_of(
        small, "parallel.tensor_parallel=4", "parallel.sequence_parallel=true", "data.sequence_length=30"
    )
    assert "30 tokens of data.sequence_length" in line and "use a length of 28 or 32" in line
    (line,) = problems_of(small, "parallel.offload_optimizer=cpu", "parallel.zero_stage=0")
    assert "needs zero_stage = 1, 2 or 3" in line
    (line,) = problems_of(small, "parallel.offload_optimizer=nvme")
    assert "needs zero_stage = 3 and an offload_folder" in line
    (line,) = problems_of(small, "parallel.offload_folder=/tmp")
    assert "leave it out" in line
    (line,) = problems_of(small, "checkpoint.every=100", "checkpoint.keep_every=250")
    assert "checkpoint.keep_every = 250" in line and "the nearest are 200 or 300" in line
    (line,) = problems_of(small, "faults.spike_factor=0.5")
    assert "use 2.0 or more, or 0" in line


def test_a_missing_file_names_those_that_exist(small: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are .*small\.toml"):
        load_config(small.with_name("smal.toml"))


@pytest.mark.parametrize("content", [b"[training\n", b"\xff\xfe", b"training = 5\n"])
def test_a_file_that_is_no_config_gives_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert str(path) in problems_of(path)[0]


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (1, [], []),
        (4, [], []),
        (3, ["parallel.tensor_parallel=2"], ["use one of [1], or start 2 or 4 processes"]),
        (1, ["parallel.tensor_parallel=2"], ["use one of [1], or start 2 processes"]),
        (3, [], ["the nearest are 6 or 12"]),
        (8, [], ["that is 16; the nearest are 16, or micro_batch_size = 1"]),
    ],
)
def test_a_world_size_that_does_not_fit_is_refused_with_those_that_do(
    small: Path, world: int, overrides: list[str], expected: list[str]
) -> None:
    problems = check_topology(load_config(small, overrides), world)
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))


def test_what_the_topology_check_proposes_is_accepted(small: Path) -> None:
    for world in range(1, 9):
        for batch in (2, 6, 8, 24):
            config = load_config(small, [f"training.global_batch_size={batch}"])
            for line in check_topology(config, world):
                for proposal in line.split("the nearest are ")[1].split(", or micro")[0].split(" or "):
                    mended = load_config(small, [f"training.global_batch_size={proposal}"])
                    assert check_topology(mended, world) == []
                if "micro_batch_size = " in line.split("the nearest are ")[1]:
                    micro = line.rpartition("= ")[2]
                    mended = load_config(
                        small, [f"training.global_batch_size={batch}", f"training.micro_batch_size={micro}"]
                    )
                    assert check_topology(mended, world) == []


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    alpha=st.floats(0, 1),
    rate=st.floats(1e-12, 1e3),
    languages=st.lists(st.text(st.characters(exclude_categories=("Cs",))), unique=True),
)
def test_a_resolved_config_round_trips_through_toml(
    tmp_path_factory: pytest.TempPathFactory, name: str, alpha: float, rate: float, languages: list[str]
) -> None:
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(SMALL, encoding="utf-8")
    config = load_config(path)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shards=f"x{name}", sampling_alpha=alpha, languages=languages),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
    )
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_every_section_and_field_is_documented() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for cls in SECTIONS.values():
        body = classes[cls.__name__].body
        for here, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(here)


def test_the_rules_name_only_fields_that_exist() -> None:
    named = [*CHOICES, *AT_LEAST, *ABOVE_ZERO, *BETWEEN, *NOT_EMPTY]
    assert set(named).union(*(names for names, _ in CROSS_RULES)) <= set(FIELDS)
    assert len(named) == len(set(named))


def test_the_decays_of_the_config_are_those_of_the_schedule() -> None:
    assert CHOICES["schedule.decay"] == tuple(DECAYS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_is_complete_and_sound(path: Path) -> None:
    config = load_config(path)
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {f"{section}.{key}" for section, keys in raw.items() for key in keys} == set(FIELDS) - OPTIONAL
    assert isinstance(config, Config)
    header = path.read_text(encoding="utf-8").split("[")[0]
    for word in ("What:", "Paper:", "Hardware:", "Cost:", "Command:"):
        assert word in header


def test_there_are_configs_for_the_demo_and_the_published_sizes() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "xlmr_base", "xlmr_xl", "xlmr_xxl", "xmod_base"}
