"""Packing: every token once and in order, documents separated, nothing from another chunk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlscale.data.packing import pack_documents

BOS, PAD, EOS = 0, 1, 2
documents = st.lists(st.lists(st.integers(4, 99), max_size=40), max_size=12)


def pack(ids: list[list[int]], length: int) -> np.ndarray:
    return pack_documents([np.array(i, dtype=np.int32) for i in ids], length, BOS, EOS, PAD)


@settings(max_examples=200, deadline=None)
@given(ids=documents, length=st.integers(2, 20))
def test_blocks_hold_every_token_of_the_documents_once_and_in_order(ids: list[list[int]], length: int) -> None:
    blocks = pack(ids, length)
    assert blocks.shape[1] == length
    assert (blocks[:, 0] == BOS).all()
    stream = blocks[:, 1:].reshape(-1)
    tokens = stream[stream != PAD].tolist()
    assert tokens == [token for document in ids if document for token in [*document, EOS]]


@settings(max_examples=200, deadline=None)
@given(ids=documents, length=st.integers(2, 20))
def test_only_the_end_of_the_last_block_is_padded(ids: list[list[int]], length: int) -> None:
    blocks = pack(ids, length)
    padding = blocks == PAD
    assert not padding[:-1].any()
    if len(blocks):
        assert (np.diff(padding[-1].astype(int)) >= 0).all()
        assert padding[-1].sum() < length - 1, "a block of nothing but padding"


def test_a_known_packing() -> None:
    assert pack([[5, 6, 7], [], [8]], 4).tolist() == [[0, 5, 6, 7], [0, 2, 8, 2]]
    assert pack([[5, 6, 7, 8]], 4).tolist() == [[0, 5, 6, 7], [0, 8, 2, 1]]


@pytest.mark.parametrize("ids", [[], [[]], [[], []]])
def test_documents_without_tokens_make_no_block(ids: list[list[int]]) -> None:
    assert pack(ids, 8).shape == (0, 8)
