"""Run by each rank of a launch: every head split over tensor-parallel ranks, or under ZeRO-3, against the whole model.

Argument: "split" (all ranks one tensor-parallel group) or "zero" (all ranks data-parallel).
"""

import sys
from functools import partial
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from tests.distributed.encoder_cases import SMALL, XMOD
from xlscale.config_sections import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from xlscale.models.bare import OnEncoder
from xlscale.models.dropout import DropoutKey
from xlscale.models.heads import HEADS
from xlscale.models.init import init_weights
from xlscale.parallel.tensor_parallel import parallel_parts, prepare_parameters, tensor_slice
from xlscale.parallel.topology import Topology, process_groups, world_size_from_environment
from xlscale.parallel.zero import build

DECODER = ModelConfig(**SMALL, model_type="xlm-roberta-xl", is_decoder=True, type_vocab_size=2)
PLAIN = ModelConfig(**SMALL, **XMOD, default_language="de_DE")


def arguments(head: str) -> dict[str, Any]:
    """One batch, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 2, 8) if head == "ForMultipleChoice" else (4, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([8, 7, 8, 4])[:, None]).long()
    given: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True}
    if head == "ForMultipleChoice":
        mask = mask[:, None].expand(4, 2, 8)
    if head == "ForQuestionAnswering":
        given |= {"start_positions": torch.tensor([0, 3, 5, 99]), "end_positions": torch.tensor([2, 3, 7, 1])}
    elif head in ("ForSequenceClassification", "ForMultipleChoice"):
        given["labels"] = torch.tensor([0, 1, 1, 1])  # as many of each would cancel in the bias, to rounding
    elif head == "ForTokenClassification":
        given["labels"] = ids % 2
    elif head != "Model":
        given["labels"] = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    if head == "ForMultipleChoice":
        given["lang_ids"] = torch.tensor([1, 0, 2, 1])
    return given | {"attention_mask": mask}


def config_of(head: str) -> ModelConfig:
    return DECODER if head == "ForCausalLM" else PLAIN


def whole(head: str) -> OnEncoder:
    """The model on one process, every parameter noisy, after one backward."""
    model = HEADS[head](config_of(head))
    init_weights(model, config_of(head), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loss_of(model(**arguments(head))).backward()
    return model


def loss_of(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output.pooler_output.square().mean()


def compare(output: Any, expected: Any) -> None:
    for name, found, wanted in zip(output._fields, output, expected, strict=True):
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
        for one, other in pairs:
            if other is None:
                assert one is None, name
            else:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def compare_gradient(name: str, found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    if wanted is None:  # a language without a sample
        assert found is None or not found.any(), name
        return
    assert found is not None, name
    # Of 0 are the true gradients of what softmax ignores: the bias of the keys, of all tokens, of all choices.
    difference, norm = float((found - wanted).norm()), float(wanted.norm())
    assert difference <= max(1e-5 * norm, 1e-6 if norm < 1e-5 else 0.0), (name, difference, norm)


def check_split(topology: Topology, head: str, sequence_parallel: bool) -> None:
    parts = parallel_parts(topology, DropoutKey(), sequence_parallel)
    reference, model = whole(head), HEADS[head](config_of(head), parts)
    prepare_parameters(model, topology, sequence_parallel)
    parameters = dict(reference.named_parameters())
    cut = partial(tensor_slice, tp_rank=topology.tp_rank, tp=topology.tp)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(cut(parameters[name], name))
    output = model(**arguments(head))
    compare(output, reference(**arguments(head)))
    loss_of(output).backward()
    for name, parameter in model.named_parameters():
        wanted = parameters[name].grad
        compare_gradient(name, parameter.grad, None if wanted is None else cut(wanted, name))


def check_zero(topology: Topology, head: str) -> None:
    reference = whole(head)
    parameters = dict(reference.named_parameters())
    config = Config(
        training=TrainingConfig(
            total_steps=1, global_batch_size=topology.dp, micro_batch_size=1, precision="fp32", max_grad_norm=0.0
        ),
        model=config_of(head),
        data=DataConfig(shards="-", tokenizer="-"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=0),
    )
    sharded = build(config, topology, lambda named, _: torch.optim.AdamW([p for _, p in named]), HEADS[head])
    sharded.load(lambda _, name, start, stop: parameters[name].detach()[start:stop])
    output = sharded.engine(**arguments(head))
    compare(output, reference(**arguments(head)))
    sharded.engine.backward(loss_of(output), scale_wrt_gas=False)
    for name, parameter in sharded.named_parameters():
        compare_gradient(name, safe_get_full_grad(parameter), parameters[name].grad)
    sharded.engine.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    split = sys.argv[1] == "split"
    with process_groups(world_size_from_environment() if split else 1) as topology:
        for head in HEADS:
            if split:
                check_split(topology, head, False)
                check_split(topology, head, True)
            else:
                check_zero(topology, head)
            print(head, "is the same", flush=True)
