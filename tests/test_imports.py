"""The layout of DESIGN.md: imports go one way, and only xlscale/parallel knows the engines."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# Lower may not import higher; modules of one level may import each other as long as no circle arises.
LEVELS = {
    "xlscale": 0,
    "xlscale.config": 0,
    "xlscale.config_deepspeed": 0,
    "xlscale.config_rules": 0,
    "xlscale.config_rules_data": 0,
    "xlscale.config_rules_model": 0,
    "xlscale.config_sections": 0,
    "xlscale.config_values": 0,
    "xlscale.languages": 0,
    "xlscale.ports": 0,
    "xlscale.tokenizer": 1,
    "xlscale.tokenizer_bpe": 1,
    "xlscale.tokenizer_hub": 1,
    "xlscale.tokenizer_json": 1,
    "xlscale.models": 1,
    "xlscale.data": 1,
    "xlscale.training.schedule": 1,
    "xlscale.training.optimizer": 1,
    "xlscale.parallel": 2,
    "xlscale.checkpoint": 3,
    "xlscale.training": 4,
    "xlscale.extend": 5,
    "xlscale.extend_init": 5,
    "xlscale.charts": 5,
    "xlscale.page": 5,
    "xlscale.run_folder": 5,
    "xlscale.report": 5,
    "xlscale.report_data": 5,
    "xlscale.extend_vocabulary": 5,
    "xlscale.vocabulary_loss": 5,
    "xlscale.vocabulary_mixtures": 5,
    "xlscale.vocabulary_pieces": 5,
    "xlscale.vocabulary_rows": 5,
    "xlscale.vocabulary_texts": 5,
    "xlscale.vocabulary_vectors": 5,
    "xlscale.cli": 6,
    "xlscale.cli_data": 6,
    "xlscale.cli_deepspeed": 6,
    "xlscale.cli_extend": 6,
}
FOR_PIPELINES = (
    "xlscale.charts",
    "xlscale.page",
    "xlscale.data.shards",
    "xlscale.data.shard_writer",
    "xlscale.data.remote",
    "xlscale.languages",
    "xlscale.tokenizer",
    "xlscale.tokenizer_bpe",
    "xlscale.__version__",
)
WITHOUT_TORCH = ("xlscale.config", "xlscale.languages", "xlscale.tokenizer", "xlscale.data", "xlscale.cli")


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """Every module of `package` by its dotted name."""
    for path in sorted((REPO / package).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, those inside functions too; `from a import b` is a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def level(name: str) -> int:
    """The level of a module: that of the longest prefix in LEVELS."""
    while name not in LEVELS:
        name, _, _ = name.rpartition(".")
        assert name, "a module without a level"
    return LEVELS[name]


def known_level(name: str) -> int:
    """As level(), but a name below the package alone is a module that LEVELS does not know yet."""
    top = ".".join(name.split(".")[:2])
    assert top in LEVELS or any(key.startswith(f"{top}.") for key in LEVELS), f"give {name} a level in LEVELS"
    return level(name)


MODULES = dict(sources("xlscale"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported.startswith("xlscale.") and imported != "xlscale.__version__":
            assert known_level(imported) <= known_level(name), f"{name} imports {imported}"


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    edges = {}
    for name, path in MODULES.items():
        names = imports(path)
        edges[name] = {other for other in MODULES if other != name and other != "xlscale"
                       and any(i == other or i.startswith(f"{other}.") for i in names)}  # fmt: skip
        # a package's own __init__ is not a way to its modules
        edges[name] -= {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)}
    while edges:
        free = {name for name, to in edges.items() if not to & edges.keys()}
        assert free, f"circle among {sorted(edges)}"
        edges = {name: to for name, to in edges.items() if name not in free}


@pytest.mark.parametrize("name", MODULES)
def test_only_parallel_knows_deepspeed_and_fairscale(name: str) -> None:
    engines = {i for i in imports(MODULES[name]) if i.partition(".")[0] in ("deepspeed", "fairscale")}
    assert not engines or name.startswith("xlscale.parallel")


@pytest.mark.parametrize("name", MODULES)
def test_xlscale_never_imports_the_pipelines_and_trains_without_transformers(name: str) -> None:
    assert not {i for i in imports(MODULES[name]) if i.partition(".")[0] in ("data_pipelines", "transformers")}


@pytest.mark.parametrize("name", dict(sources("data_pipelines")))
def test_the_pipelines_import_only_shards_languages_and_tokenizer(name: str) -> None:
    ours = {i for i in imports(dict(sources("data_pipelines"))[name]) if i.partition(".")[0] == "xlscale"}
    assert not {i for i in ours if not any(i == ok or i.startswith(f"{ok}.") for ok in FOR_PIPELINES)}


def test_data_languages_tokenizer_and_the_command_line_start_without_torch() -> None:
    names = [name for name in MODULES if name.startswith(WITHOUT_TORCH)]
    code = f"import sys\nfor name in {names}: __import__(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", {**MODULES, **dict(sources("data_pipelines"))})
def test_no_module_is_a_drawer_for_everything(name: str) -> None:
    assert name.rpartition(".")[2] not in ("utils", "util", "common", "base", "helpers", "misc", "registry")
