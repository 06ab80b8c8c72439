"""At every ZeRO stage, in fp32 and bf16, the update is plain torch's; any stage goes on from another's checkpoint.

And what the engine does wrong in silence cannot be reached.
"""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run

CASES = 2 * 2 * 4
"""Shapes, precisions, stages."""
OFFLOADED = 3


def launch(world_size: int, worker: str, sizes: list[str], folder: Path) -> list[list[str]]:
    """What each rank has said, line by line."""
    (folder / "tokenizer").mkdir()
    run(world_size, [str(ROOT / "tests" / "distributed" / worker), str(folder), *sizes], folder / "log", timeout=300)
    return [(folder / f"log.{rank}").read_text().splitlines() for rank in range(world_size)]


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return launch(4, "guard_cases.py", ["2", "4"], tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return launch(2, "stage_cases.py", ["1", "2"], tmp_path_factory.mktemp("two"))


def test_every_stage_is_plain_torch_on_two_ranks(two_ranks: list[list[str]]) -> None:
    for said in two_ranks:
        assert sum(line.endswith("is plain torch's") for line in said) == CASES + OFFLOADED


def test_every_stage_is_plain_torch_on_four_ranks(four_ranks: list[list[str]]) -> None:
    for said in four_ranks:
        assert sum(line.endswith("is plain torch's") for line in said) == CASES


@pytest.mark.parametrize("claim", ["decays no norm and no bias", "reads its share"])
def test_every_stage_that_goes_on_at_another_shape(
    claim: str, two_ranks: list[list[str]], four_ranks: list[list[str]]
) -> None:
    for said in two_ranks + four_ranks:
        assert sum(line.endswith(claim) for line in said) == CASES // 2


@pytest.mark.parametrize(
    "guard",
    [
        "refuses_the_engines_own_files",
        "refuses_an_old_engine",
        "refuses_an_mpu_that_drops_tensor_parallelism",
        "names_a_parameter_partitioned_over_the_wrong_ranks",
        "refuses_to_average_over_the_wrong_ranks",
        "names_a_parameter_that_the_norm_would_count_wrongly",
    ],
)
def test_guard(guard: str, four_ranks: list[list[str]]) -> None:
    for said in four_ranks:
        assert [line for line in said if line.startswith(guard)] == [f"{guard}: yes"]
