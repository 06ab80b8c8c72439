"""X-MOD under ZeRO and tensor parallelism is plain torch with an optimizer for each language."""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run
from tests.distributed.xmod_cases import CASES


@pytest.mark.parametrize(
    ("which", "world_size", "sizes"),
    [
        ("quick", 2, ["1", "2"]),
        ("quick", 4, ["2"]),
        *(pytest.param("all", *of, marks=pytest.mark.slow) for of in ((1, ["1"]), (2, ["1", "2"]), (4, ["2"]))),
    ],
)
def test_adapters_are_trained_as_with_an_optimizer_for_each_language(
    which: str, world_size: int, sizes: list[str], tmp_path: Path
) -> None:
    worker = str(ROOT / "tests" / "distributed" / "xmod_cases.py")
    run(world_size, [worker, which, *sizes], tmp_path / "log", timeout=300 if which == "quick" else 1200)
    for rank in range(world_size):
        said = (tmp_path / f"log.{rank}").read_text().splitlines()
        cases = len(CASES[which][world_size]) * len(sizes)
        assert sum(line.endswith("is plain torch's") for line in said) == cases
        assert said.count("different languages are refused") == (len(sizes) if world_size > 1 else 0)
