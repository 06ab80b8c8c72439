"""Which shapes let all ranks have the same languages in every micro-step, and how rows come to their adapters."""

import numpy as np
import pytest

from xlscale.config_rules_data import routing_problem
from xlscale.config_sections import ModelConfig
from xlscale.data.sampling import micro_batch_slots
from xlscale.data.stream import Batch
from xlscale.training.routing import adapters_of, grouped


def runs_of(slots: np.ndarray, run: int) -> dict[int, int]:
    """Run of slots -> how many of them."""
    numbers, counts = np.unique(slots // run, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def model_with(*languages: str) -> ModelConfig:
    return ModelConfig(
        model_type="xmod", languages=list(languages), vocab_size=40, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("run", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("languages", [1, 2, 3, 4])
def test_a_shape_is_allowed_where_all_ranks_have_the_same_few_runs_and_no_other(run: int, languages: int) -> None:
    batch = 24
    for dp in (1, 2, 3, 4, 6):
        for micro in (1, 2, 3, 4, 6, 8):
            if batch % (dp * micro):
                continue
            allowed = routing_problem(dp, micro, batch, run, languages) is None
            try:
                micro_steps = [
                    [runs_of(micro_batch_slots(0, i, rank, dp, micro, batch, run), run) for rank in range(dp)]
                    for i in range(batch // (dp * micro))
                ]
            except AssertionError:
                micro_steps = [[{}, {0: 1}]]
            same = all(runs == ranks[0] for ranks in micro_steps for runs in ranks)
            few = all(len(runs) <= languages for ranks in micro_steps for runs in ranks)
            assert allowed == (same and few), (dp, micro)


def test_a_shape_that_is_refused_is_told_the_nearest_that_is_not() -> None:
    line = routing_problem(2, 5, 40, 4, 2)
    assert line is not None and line.endswith("the nearest micro_batch_size is 4")
    assert routing_problem(2, 4, 40, 4, 2) is None
    line = routing_problem(3, 4, 24, 4, 3)  # three ranks cannot have equal parts of runs of 4
    assert line is not None and "number of data-parallel ranks is 2" in line
    assert routing_problem(2, 4, 24, 4, 3) is None


def test_rows_come_in_the_order_of_their_adapters_and_nothing_else_changes() -> None:
    rng = np.random.default_rng(0)
    ids, labels, mask = rng.integers(0, 9, (6, 4)), rng.integers(0, 9, (6, 4)), rng.random((6, 4)) < 0.5
    batch = Batch(ids, labels, mask, np.array([0, 2, 1, 0, 2, 1]), np.arange(6) + 100, segments=ids.astype(np.int32))
    adapters = adapters_of(["de_DE", "en_XX", "fr_XX"], model_with("fr_XX", "en_XX", "de_DE"))
    assert adapters.tolist() == [2, 1, 0]
    there = grouped(batch, adapters)
    assert there.languages.tolist() == [2, 2, 1, 1, 0, 0]
    assert there.slots.tolist() == [101, 104, 102, 105, 100, 103]
    for name in ("input_ids", "labels", "attention_mask", "segments"):
        assert np.array_equal(getattr(there, name), getattr(batch, name)[there.slots - 100])
    assert grouped(there, adapters) is there


def test_a_language_of_the_data_without_an_adapter_is_named() -> None:
    with pytest.raises(ValueError, match=r"sw_KE, zu_ZA, for which model\.languages has no adapter"):
        adapters_of(["de_DE", "sw_KE", "zu_ZA"], model_with("de_DE", "en_XX"))
