"""Duplicates in data_pipelines: the join in files against one in memory, clusters, paragraphs."""

import base64
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DeduplicateConfig
from data_pipelines.steps.columns import column
from data_pipelines.steps.document import dropped
from data_pipelines.steps.duplicates import DropNearDuplicates
from data_pipelines.steps.join import groups, mark_firsts
from tests.test_pipeline_steps import document


def signed(signatures: np.ndarray) -> list[Document]:
    """A document for each row."""
    rows = [base64.b64encode(row.astype("<u4").tobytes()).decode() for row in signatures]
    return [document("text", f"id{i:05d}", signature=row) for i, row in enumerate(rows)]


def decided(
    config: DeduplicateConfig, signatures: np.ndarray, folder: Path | None = None, memory: int = 1 << 28
) -> list:
    """(original, similarity) of each near duplicate, None of the others."""
    step = DropNearDuplicates(config, folder)
    step.memory = memory
    data = list(step.run(iter(signed(signatures))))
    return [(d.metadata["duplicate_of"], d.metadata["similarity"]) if dropped(d) else None for d in data]


def decided_in_memory(config: DeduplicateConfig, signatures: np.ndarray) -> list:
    """The same from the definition: each against all kept ones that share a band, one after the other."""
    kept: list[int] = []
    result = []
    for i, one in enumerate(signatures):
        same = [(np.mean(one == signatures[k]), -k) for k in kept
                if (one == signatures[k]).reshape(config.bands, config.rows).all(1).any()]  # fmt: skip
        best = max(same, default=(0.0, 0))
        if same and best[0] >= config.min_similarity:
            result.append((f"id{-best[1]:05d}", round(float(best[0]), 3)))
        else:
            kept.append(i)
            result.append(None)
    return result


@pytest.mark.parametrize(("bands", "rows", "threshold"), [(14, 8, 0.75), (6, 1, 0.6), (3, 2, 0.6), (1, 1, 1.0)])
@pytest.mark.parametrize(("memory", "block"), [(100, 3), (1000, 512), (1 << 20, 7)])
def test_join_in_files_decides_as_one_in_memory(bands, rows, threshold, memory, block, monkeypatch):
    monkeypatch.setattr("data_pipelines.steps.join.ROWS", block)
    config = DeduplicateConfig(bands=bands, rows=rows, min_similarity=threshold)
    found = 0
    for seed in range(40):
        # Few different hashes: many documents share a band, many pairs are close to the threshold, or as close.
        rng = np.random.default_rng(seed)
        signatures = rng.integers(0, 4, (seed, bands * rows), dtype=np.uint32)
        copies = rng.integers(0, max(1, seed), seed)
        signatures = np.where(rng.random(signatures.shape) < 0.8, signatures[copies], signatures)
        expected = decided_in_memory(config, signatures)
        assert decided(config, signatures, memory=memory) == expected, seed
        found += sum(row is not None for row in expected)
    assert found > 100


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=200), st.sampled_from([64, 500, 5000, 1 << 20]))
def test_groups_are_all_places_of_equal_keys_whatever_the_memory(values, memory):
    keys = np.array(values, dtype=np.uint64)
    found = []
    for places, sizes in groups(keys, memory):
        found += [part.tolist() for part in np.split(places, np.cumsum(sizes)[:-1]) if len(part)]
    expected = [np.flatnonzero(keys == key).tolist() for key in np.unique(keys)]
    assert sorted(found) == sorted(group for group in expected if len(group) > 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60), st.sampled_from([64, 500, 1 << 20]))
def test_first_of_equal_keys_is_that_of_all_their_numbers(pairs, memory):
    first = np.zeros(len(pairs), np.uint32)
    mark_firsts(np.array(pairs, dtype=np.uint64).reshape(-1, 2), memory, first)
    assert first.tolist() == [0 if pairs.index(pair) == i else pairs.index(pair) + 1 for i, pair in enumerate(pairs)]


def test_bands_whose_hashes_are_equal_by_chance_make_no_pair(monkeypatch):
    config = DeduplicateConfig(bands=2, rows=2, min_similarity=0.5)
    signatures = np.array([[1, 2, 3, 4], [1, 9, 3, 8], [1, 2, 7, 7]], dtype=np.uint32)
    expected = [None, None, ("id00000", 0.5)]
    assert decided(config, signatures) == expected
    monkeypatch.setattr("data_pipelines.steps.join.scramble", lambda hashes: hashes & np.uint64(0))
    assert decided(config, signatures) == expected


def test_join_takes_less_memory_than_its_signatures(tmp_path):
    rng = np.random.default_rng(1)
    total, config = 8001, DeduplicateConfig()
    signatures = rng.integers(0, 2**32, (total, 112), dtype=np.uint32)  # 3.6 MB
    signatures[1::3] = signatures[::3]
    step, peak = DropNearDuplicates(config, tmp_path, 1), 0
    data = step.run(Document("", f"{i}", metadata={"signature": base64.b64encode(row.tobytes()).decode()})
                    for i, row in enumerate(signatures))  # fmt: skip
    tracemalloc.start()  # what is mapped from files does not count
    sizes = Counter(d.metadata.get("cluster_size") for d in data if not dropped(d))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == {2: total // 3, None: total - 2 * (total // 3)}
    assert peak < 3e6 < signatures.nbytes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [None, "scratch"])
def test_first_of_a_cluster_has_its_size(tmp_path, folder):
    signatures = np.arange(5 * 112, dtype=np.uint32).reshape(5, 112)[[0, 1, 0, 2, 0, 1]]
    step = DropNearDuplicates(DeduplicateConfig(), folder and tmp_path / folder)
    data = list(step.run(iter(signed(signatures))))
    assert [d.metadata.get("cluster_size") for d in data] == [3, 2, None, None, None, None]
    assert [d.metadata.get("dropped") for d in data] == [None, None, "near_duplicate", None, *["near_duplicate"] * 2]
    assert [d.text for d in data] == ["text"] * 6


def test_folder_of_a_killed_join_is_emptied(tmp_path):
    (tmp_path / "near-00000").mkdir()
    (tmp_path / "near-00000/keys").write_bytes(b"old")
    assert decided(DeduplicateConfig(), np.zeros((2, 112), np.uint32), tmp_path) == [None, ("id00000", 1.0)]
    assert not list(tmp_path.iterdir())


def test_room_for_the_join_is_taken_before_it_starts(tmp_path):
    # Else a disk that fills up kills the process (SIGBUS) at some later write into the mapped file.
    array = column(tmp_path / "a", np.uint32, (1000, 1000))
    assert (tmp_path / "a").stat().st_blocks * 512 >= array.nbytes == 4_000_000
    assert not array.any()
