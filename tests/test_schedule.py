"""xlscale/training/schedule.py: warm-up and decay as a pure function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlscale.config_sections import ScheduleConfig
from xlscale.training.schedule import DECAYS, lr_at

PEAK = 6e-4


def test_roberta_base_has_its_published_learning_rates() -> None:
    cfg = ScheduleConfig(warmup_steps=24_000)
    assert lr_at(11_999, PEAK, cfg, 500_000) == pytest.approx(PEAK / 2)
    assert lr_at(24_000, PEAK, cfg, 500_000) == PEAK
    assert lr_at(262_000, PEAK, cfg, 500_000) == pytest.approx(PEAK / 2)
    assert lr_at(500_000, PEAK, cfg, 500_000) == 0.0


def test_the_first_update_already_moves() -> None:
    assert lr_at(0, PEAK, ScheduleConfig(warmup_steps=10), 100) == pytest.approx(PEAK / 10)
    assert lr_at(0, PEAK, ScheduleConfig(warmup_steps=0), 100) == PEAK


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_it_rises_to_the_peak_and_falls_to_the_final_fraction(decay: str, final: float) -> None:
    cfg = ScheduleConfig(warmup_steps=30, decay=decay, final_fraction=final)
    rates = [lr_at(step, PEAK, cfg, 300) for step in range(301)]
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[30] == pytest.approx(PEAK) == max(rates)
    assert rates[300] == pytest.approx(PEAK if decay == "constant" else final * PEAK, abs=1e-12)


def test_the_cosine_is_half_way_down_in_the_middle() -> None:
    cfg = ScheduleConfig(warmup_steps=0, decay="cosine")
    assert lr_at(50, 1.0, cfg, 100) == pytest.approx(0.5)
    assert lr_at(25, 1.0, cfg, 100) > 0.75


@given(
    step=st.integers(0, 10_000),
    warmup=st.integers(0, 1000),
    extra=st.integers(0, 1000),
    decay=st.sampled_from(sorted(DECAYS)),
    final=st.floats(0, 1),
)
def test_the_rate_stays_between_zero_and_the_peak(step: int, warmup: int, extra: int, decay: str, final: float) -> None:
    cfg = ScheduleConfig(warmup_steps=warmup, decay=decay, final_fraction=final)
    assert 0.0 <= lr_at(step, PEAK, cfg, warmup + extra) <= PEAK * (1 + 1e-12)
