"""What the model is given: packed documents are as if alone, columns of nothing but padding are not computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.packed import BOS, PAD, alone, batch_of, documents_of
from tests.test_encoder import FAMILIES, noisy, small
from xlscale.data.packing import Packing
from xlscale.data.stream import Batch
from xlscale.training.inputs import model_inputs

CPU = torch.device("cpu")
POSITIONS = ("absolute", "relative_key", "relative_key_query")
APART = Packing("best_fit", 16, False, BOS, PAD)
DOCUMENTS = documents_of([3, 9, 4, 21, 2, 2], vocabulary=90)
"""In parts of 15 tokens and with <s> 4, 10, 5, 16, 7, 3, 3; in the rows 7 + 4 + 3, 10 + 5, 16 and 3."""


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_logits_that_each_has_alone(family: str, positions: str) -> None:
    model, batch = noisy(small(family, position_embedding_type=positions)), batch_of(APART, DOCUMENTS)
    inputs = model_inputs(batch, CPU, PAD, 8)
    inputs.pop("labels")
    logits_BTV = model.logits(**inputs)
    blended_BTV = model.logits(inputs["input_ids"])
    parts, found = alone(DOCUMENTS, 15), 0
    for ids_1T, _ in parts:
        wanted = model.logits(ids_1T)[0]
        for row, at in np.argwhere(batch.input_ids == BOS):
            piece = slice(at, at + ids_1T.shape[1])
            if np.array_equal(batch.input_ids[row, piece], ids_1T[0].numpy()):
                torch.testing.assert_close(logits_BTV[row, piece], wanted, atol=1e-5, rtol=1e-5)
                if ids_1T.shape[1] < 16:
                    assert not torch.allclose(blended_BTV[row, piece], wanted, atol=1e-3), "it makes no difference"
                found += 1
    assert found == len(parts) and batch.segments is not None and batch.segments.max() == 3


@pytest.mark.parametrize("kind", ["sentences", "best_fit"])
def test_padding_attends_to_padding_and_positions_begin_anew(kind: str) -> None:
    batch = batch_of(Packing(kind, 8, False, BOS, PAD), documents_of([3, 2, 9], 90))
    inputs = model_inputs(batch, CPU, PAD, 8)
    mask, segments, position_ids = inputs["attention_mask"], batch.segments, inputs["position_ids"]
    assert mask is not None and mask.dtype == torch.bool and segments is not None and position_ids is not None
    assert np.array_equal(mask.numpy(), segments[:, :, None] == segments[:, None, :])
    assert mask.any(-1).all(), "a row of the softmax is empty"
    assert (position_ids.numpy()[batch.input_ids == BOS] == PAD + 1).all()
    assert np.array_equal(position_ids.numpy() == PAD, batch.input_ids == PAD) and (batch.input_ids == PAD).any()


def loss_and_gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).losses_M.mean()
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_columns_changes_neither_loss_nor_gradients(family: str, attention: bool) -> None:
    model = noisy(small(family)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.layers:
        layer.attention.dropout_prob = 0.0
    documents = documents_of([3, 5, 2, 7, 2], 90)
    # Blocks of 9 tokens in rows of 18: a half of each is padding.
    narrow = batch_of(Packing("best_fit", 9, attention, BOS, PAD), documents)
    fill = ((0, 0), (0, 9))
    wide = Batch(
        np.pad(narrow.input_ids, fill, constant_values=PAD),
        np.pad(narrow.labels, fill, constant_values=-100),
        np.pad(narrow.input_ids != PAD, fill),
        narrow.languages,
        narrow.slots,
        None if narrow.segments is None else np.pad(narrow.segments, fill),
    )
    whole, cut = (model_inputs(wide, CPU, PAD, multiple) for multiple in (18, 1))
    assert [inputs["input_ids"].shape[1] for inputs in (whole, cut)] == [18, 9]
    wanted = loss_and_gradients(model, whole)
    for name, tensor in loss_and_gradients(model, cut).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("longest", "multiple", "width"),
    [(3, 8, 8), (8, 8, 8), (9, 8, 16), (17, 8, 20), (20, 8, 20), (9, 6, 12), (9, 1, 9)],
)
def test_rows_are_cut_to_the_longest_rounded_up(longest: int, multiple: int, width: int) -> None:
    batch = batch_of(Packing("documents", 20, True, BOS, PAD), documents_of([longest - 1, 2], 90))
    inputs = model_inputs(batch, CPU, PAD, multiple)
    assert inputs["input_ids"].tolist() == batch.input_ids[:, :width].tolist()
    assert inputs["labels"].tolist() == batch.labels[:, :width].tolist()
    assert inputs["attention_mask"].tolist() == batch.attention_mask[:, :width].tolist()
    assert inputs["position_ids"] is None


def test_there_is_no_mask_where_nothing_is_padded_and_no_row_has_a_second_document() -> None:
    full = batch_of(Packing("sentences", 16, True, BOS, PAD), documents_of([15, 7, 8], 90))
    even = batch_of(Packing("documents", 16, True, BOS, PAD), documents_of([7, 7], 90))  # nothing, once it is cut
    single = batch_of(APART, documents_of([15, 15], 90))
    assert full.attention_mask is None and even.attention_mask is not None and single.segments is not None
    for batch, width in ((full, 16), (even, 8), (single, 16)):
        inputs = model_inputs(batch, CPU, PAD, 8)
        assert inputs["attention_mask"] is None and inputs["position_ids"] is None
        assert inputs["input_ids"].shape[1] == width
    apart = model_inputs(replace(single, segments=single.segments + (np.arange(16) > 7)), CPU, PAD, 8)
    assert apart["attention_mask"] is not None
