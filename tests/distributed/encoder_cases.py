"""Run by each rank of a launch: models split over tensor-parallel ranks, or under ZeRO-3, against the whole one.

Argument: "split" (all ranks one tensor-parallel group) or "zero" (all ranks data-parallel).
"""

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from tests.packed import BOS, PAD, batch_of, documents_of, loss_alone
from xlscale.config_sections import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from xlscale.data.packing import Packing
from xlscale.models.dropout import DropoutKey
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights
from xlscale.parallel.tensor_parallel import parallel_parts, prepare_parameters, split_dim, tensor_slice
from xlscale.parallel.topology import Topology, process_groups, world_size_from_environment
from xlscale.parallel.zero import build
from xlscale.training.inputs import model_inputs

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 20, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
XMOD = {"model_type": "xmod", "languages": ["en_XX", "de_DE", "sw_KE"]}
CASES = {
    "pre-LN": ModelConfig(**SMALL, model_type="xlm-roberta-xl"),
    "post-LN": ModelConfig(**SMALL, model_type="xlm-roberta", type_vocab_size=2),
    "xmod-base": ModelConfig(**SMALL, **XMOD),
    "xmod-prenorm": ModelConfig(
        **SMALL, **XMOD, pre_norm=True, adapter_layer_norm=True, ln_before_adapter=False, adapter_reduction_factor=4
    ),
    "decoder": ModelConfig(
        **SMALL,
        model_type="xlm-roberta-xl",
        is_decoder=True,
        add_cross_attention=True,
        position_embedding_type="relative_key_query",
    ),
}


ODD_VOCABULARIES = (61, 9)
"""At tp = 4 the last rank has 13 of 16 rows, and none of 3."""

DOCUMENTS = documents_of([3, 9, 4, 21, 2, 2], vocabulary=64)
APART = Packing("best_fit", 16, False, BOS, PAD)
"""Puts the documents into 4 rows, one with three of them, one full, two padded."""


def arguments(config: ModelConfig) -> dict[str, Any]:
    """One batch, the same on every rank; sw_KE is not in it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (4, 8), generator=generator)
    given: dict[str, Any] = {"input_ids": ids, "labels": ids, "attention_mask": None}
    if config.languages:
        given["lang_ids"] = torch.tensor([1, 0, 1, 0])
    if config.add_cross_attention:
        given["encoder_hidden_states"] = torch.randn(4, 6, 32, generator=generator)
    return given


def whole(config: ModelConfig) -> MaskedLM:
    """The model on one process, every parameter noisy, after one backward."""
    model = MaskedLM(config)
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model(**arguments(config)).losses_M.mean().backward()
    return model


def assert_close(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    # The key's bias has a true gradient of zero.
    near = 1e-6 if name.endswith("key.bias") else 1e-5 * float(wanted.norm())
    assert float((found - wanted).norm()) <= near, (name, float((found - wanted).norm()), float(wanted.norm()))


def split_model(
    topology: Topology, reference: MaskedLM, key: DropoutKey, sequence_parallel: bool, recomputed: int
) -> MaskedLM:
    """This rank's part of the reference."""
    model = MaskedLM(reference.config, parallel_parts(topology, key, sequence_parallel, recomputed))
    prepare_parameters(model, topology, sequence_parallel)
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor_slice(parameters[name], name, topology.tp_rank, topology.tp))
    return model


def check_split(topology: Topology, reference: MaskedLM, sequence_parallel: bool, recomputed: int) -> None:
    model = split_model(topology, reference, DropoutKey(), sequence_parallel, recomputed)
    given = arguments(reference.config)
    losses_M = model(**given).losses_M
    torch.testing.assert_close(losses_M, reference(**given).losses_M, atol=1e-5, rtol=1e-5)
    losses_M.mean().backward()
    check_gradients(topology, reference, model)


def check_packed(topology: Topology, reference: MaskedLM, sequence_parallel: bool, recomputed: int) -> None:
    """Packed documents that do not see each other are as each alone in one process, nothing padded, nothing masked."""
    model = split_model(topology, reference, DropoutKey(), sequence_parallel, recomputed)
    one, rows = ({"lang_ids": torch.ones(n, dtype=torch.long)} if reference.config.languages else {} for n in (1, 4))
    wanted_M = loss_alone(reference, DOCUMENTS, 15, **one)
    inputs = model_inputs(batch_of(APART, DOCUMENTS), topology.device, PAD, 8)
    assert inputs["attention_mask"] is not None and inputs["attention_mask"].shape == (4, 16, 16)
    losses_M = model(**inputs, **rows).losses_M
    torch.testing.assert_close(losses_M.sort().values, wanted_M, atol=1e-5, rtol=1e-5)
    losses_M.mean().backward()
    check_gradients(topology, reference, model)


def check_gradients(topology: Topology, reference: MaskedLM, model: MaskedLM) -> None:
    parameters = dict(reference.named_parameters())
    cut = partial(tensor_slice, tp_rank=topology.tp_rank, tp=topology.tp)
    assert any(split_dim(name) is not None for name in parameters), "nothing is split"
    for name, parameter in model.named_parameters():
        wanted = parameters[name].grad
        if wanted is None:  # an absent language, or position embeddings beside relative ones
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert_close(name, parameter.grad, cut(wanted, name))


def check_zero(topology: Topology, model_config: ModelConfig) -> None:
    reference = whole(model_config)
    parameters = dict(reference.named_parameters())
    config = Config(
        training=TrainingConfig(
            total_steps=1, global_batch_size=topology.dp, micro_batch_size=1, precision="fp32", max_grad_norm=0.0
        ),
        model=model_config,
        data=DataConfig(shards="-", tokenizer="-"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=0),
    )
    sharded = build(config, topology, lambda named, _: torch.optim.AdamW([p for _, p in named]))
    sharded.load(lambda _, name, start, stop: parameters[name].detach()[start:stop])
    given = arguments(model_config)
    output = sharded.engine(given.pop("input_ids"), given.pop("labels"), given.pop("attention_mask"), **given)
    sharded.engine.backward(output.losses_M.mean(), scale_wrt_gas=False)
    for name, parameter in sharded.named_parameters():
        wanted = parameters[name].grad
        found = safe_get_full_grad(parameter)
        if wanted is None:
            assert found is None or not found.any(), name
        else:
            assert_close(name, found, wanted)
    sharded.engine.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    split = sys.argv[1] == "split"
    with process_groups(world_size_from_environment() if split else 1) as topology:
        for name, config in CASES.items():
            if split:
                reference = whole(config)
                for how in product((False, True), (0, 1, 2)):
                    check_split(topology, reference, *how)
                for how in product((False, True), (0, 1)) if not config.is_decoder else ():
                    check_packed(topology, reference, *how)
            else:
                check_zero(topology, config)
            print(name, "is the same", flush=True)
        for rows in ODD_VOCABULARIES if split else ():
            reference = whole(replace(CASES["pre-LN"], vocab_size=rows))
            check_split(topology, reference, True, 0)
            check_split(topology, reference, False, 0)
            print("vocabulary", rows, "is the same", flush=True)
