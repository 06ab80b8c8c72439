"""Before a run: a tiny model of its kind, on its processes, must compute what plain torch computes.

Tensor parallelism under ZeRO fails in silence: a gradient that is not summed, a norm that counts a part twice, a slice
that goes to the wrong rank all train on, to a worse model. So every start does one update with the run's own classes,
engine and topology, on data that it makes itself, and compares.
"""

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from xlscale.config_sections import Config, ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights
from xlscale.parallel.sharded import FP32, ShardedModel
from xlscale.parallel.tensor_parallel import split_dim, tensor_slice
from xlscale.parallel.topology import Topology, raise_together
from xlscale.parallel.zero import build

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Relative, in the L2 norm of each tensor; fp32 in another order of summing gives some 1e-6."""
SMALL = 1e-6
"""Of the gradient norm: what a gradient may be where it is truly zero, as that of the key's bias."""

MICRO_STEPS, ROWS = 2, 2
KINDS = GRADIENT, LOSS, NORM, WEIGHT = "gradient", "loss", "gradient norm", "updated weight"
"""What is compared, in this order."""

OptimizerFor = Callable[..., torch.optim.Optimizer]


def self_check(config: Config, topology: Topology, optimizer: OptimizerFor) -> None:
    """One update of a tiny model of the run's kind under the run's parallelism, compared with plain torch on each rank.

    Loss, the gradient of every parameter, the gradient norm and the weights after the update. ConfigError on all ranks
    when anything differs by more than TOLERANCE. Leaves nothing behind, the state of torch's random numbers included.
    """
    started = time.perf_counter()
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        worst = _compare(tiny(config, topology), topology, optimizer)
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    everybody: list[list[Difference]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(everybody, worst)
    found = [difference for theirs in everybody for difference in theirs]
    raise_together([_line(found, config, topology)] if found else [])
    log.info("self-check: a tiny model trains as in plain torch (%.1f s)", time.perf_counter() - started)


@dataclass(frozen=True)
class Difference:
    """Something that is not as plain torch has it."""

    kind: str
    name: str
    found: float
    wanted: float
    relative: float
    rank: int


def _line(found: list[Difference], config: Config, topology: Topology) -> str:
    """What all ranks have found, in one line about the first of KINDS: a wrong gradient explains a wrong norm."""
    kind = min((difference.kind for difference in found), key=KINDS.index)
    found = sorted((d for d in found if d.kind == kind), key=lambda d: -d.relative)
    worst, parallel = found[0], config.parallel
    names = list(dict.fromkeys(difference.name for difference in found))
    others = f" (of {len(names)}: {', '.join(names[:5])}{', ...' if names[5:] else ''})" if names[1:] else ""
    shape = (
        f"data-parallel {topology.dp} x tensor-parallel {topology.tp}, zero_stage = {parallel.zero_stage}, "
        f"sequence_parallel = {str(parallel.sequence_parallel).lower()}"
    )
    return (
        f"self-check: the {kind} of {worst.name} is {worst.found:.6g} on rank {worst.rank} and {worst.wanted:.6g} in "
        f"plain torch, a relative difference of {worst.relative:.1e}{others}; rounding stays below {TOLERANCE:.0e}. "
        f"A run at {shape} would be wrong: please report it; parallel.self_check = false goes on without the check"
    )


def tiny(config: Config, topology: Topology) -> Config:
    """The run's config at a size of nothing: what decides about code paths stays, what decides about size goes."""
    model, tp = config.model, topology.tp
    heads = 2 * tp
    vocab_size = max(4, -(-64 // tp)) * tp
    tokens = max(4, -(-16 // tp)) * tp
    return replace(
        config,
        training=replace(
            config.training,
            global_batch_size=MICRO_STEPS * ROWS * topology.dp,
            micro_batch_size=ROWS,
            precision="fp32",
            # Of two layers; every k-th of more stays "not all".
            activation_checkpointing=min(config.training.activation_checkpointing, 2),
        ),
        parallel=replace(config.parallel, offload_optimizer="none", offload_folder=""),
        # How the engine cuts and gathers stays; a raw key may lower precision, or write files of its own.
        deepspeed={key: value for key, value in config.deepspeed.items() if key == "zero_optimization"},
        model=replace(
            model,
            # One rank's rows are fewer than another's, as in the run.
            vocab_size=vocab_size - (1 if model.vocab_size % tp else 0),
            hidden_size=8 * heads,
            num_hidden_layers=2,
            num_attention_heads=heads,
            intermediate_size=16 * heads,
            adapter_reduction_factor=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=tokens + 2,
            # At 0.02 the softmax of so few dimensions is flat, and query and key have next to no gradient.
            initializer_range=0.2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            languages=model.languages[:2],
            default_language="",
        ),
        data=replace(config.data, sequence_length=tokens),
        # With the run's eps Adam's first step is the gradient's sign, which is rounding where the gradient is; and a
        # step of the run's size would be lost in the weights' own last digits.
        optimizer=replace(config.optimizer, learning_rate=0.01, eps=1e-2),
    )


def micro_batch(model: ModelConfig, tokens: int, micro_step: int, dp_rank: int) -> dict[str, torch.Tensor]:
    """What one data-parallel rank is given: ids [ROWS, T] of which a third have labels; padding in micro-step 1."""
    generator = torch.Generator().manual_seed(1 + micro_step + MICRO_STEPS * dp_rank)
    ids_BT = torch.randint(3, model.vocab_size, (ROWS, tokens), generator=generator)
    unlabelled_BT = torch.rand(ROWS, tokens, generator=generator) > 1 / 3
    unlabelled_BT[:, 1] = False  # no rank is without labels
    if micro_step == 1:
        ids_BT[-1, tokens // 2 + 1 :] = model.pad_token_id
    padding_BT = ids_BT == model.pad_token_id
    given = {
        "input_ids": ids_BT,
        "labels": ids_BT.masked_fill(unlabelled_BT | padding_BT, IGNORE),
        "attention_mask": ~padding_BT,
    }
    if model.languages:
        # The same languages on all ranks: each must gather the same adapters.
        given["lang_ids"] = torch.arange(ROWS) % len(model.languages)
    return given


@dataclass(frozen=True)
class Update:
    """One update of the tiny model in plain torch."""

    loss: float
    norm: float
    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def plain_update(config: Config, dp: int, device: torch.device, optimizer: OptimizerFor, clip: bool) -> Update:
    """The update on one process: nothing split, the batches of all data-parallel ranks together.

    clip: whether to scale the gradients to half their norm, as the engine is told to.
    """
    model = MaskedLM(config.model)
    init_weights(model, config.model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and norms of one would hide what is done to them.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(device)
    named = dict(model.named_parameters())
    made = optimizer(named.items(), config.optimizer)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    losses = []
    for micro_step in range(MICRO_STEPS):
        ranks = [micro_batch(config.model, config.data.sequence_length, micro_step, rank) for rank in range(dp)]
        given = {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}
        losses.append(model(**_on(device, given)).losses_M)
    loss = torch.cat(losses).mean()
    loss.backward()
    for parameter in model.parameters():
        # The engine updates what has no gradient too, as one that is zero.
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm / 2)
    made.step()
    after = {name: parameter.detach() for name, parameter in named.items()}
    return Update(loss.item(), norm, before, gradients, after)


def _compare(config: Config, topology: Topology, optimizer: OptimizerFor) -> list[Difference]:
    """What differs on this rank, of the first kind of which anything does."""
    clip = config.training.max_grad_norm > 0
    plain = plain_update(config, topology.dp, topology.device, optimizer, clip)
    if clip:
        config = replace(config, training=replace(config.training, max_grad_norm=plain.norm / 2))
    with _built(config, topology, optimizer) as sharded:
        sharded.load(lambda _, name, start, stop: plain.before[name][start:stop].cpu())
        return _update(sharded, config, plain)


@contextlib.contextmanager
def _built(config: Config, topology: Topology, optimizer: OptimizerFor) -> Iterator[ShardedModel]:
    sharded = build(config, topology, optimizer)
    try:
        yield sharded
    finally:
        sharded.engine.destroy()
        _forget(sharded.engine.module)


def _forget(module: torch.nn.Module) -> None:
    """Let go of a model that ZeRO-3 keeps, and with it its engine, in a list and in a method's cache for ever."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _update(sharded: ShardedModel, config: Config, plain: Update) -> list[Difference]:
    """The update under the engine, and how it differs from plain torch's."""
    topology, engine = sharded.topology, sharded.engine
    batches = [
        micro_batch(config.model, config.data.sequence_length, micro_step, topology.dp_rank)
        for micro_step in range(MICRO_STEPS)
    ]
    sums_2 = torch.zeros(2, device=topology.device)
    sums_2[1] = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    dist.all_reduce(labels := sums_2[1].clone(), group=topology.dp_group)
    gradients: dict[str, torch.Tensor | None] = {}
    for micro_step, batch in enumerate(batches):
        given = _on(topology.device, batch)
        sharded.dropout_key.set(0, micro_step)
        output = engine(given.pop("input_ids"), given.pop("labels"), given.pop("attention_mask"), **given)
        engine.backward(output.losses_M.sum() * (topology.dp / float(labels)), scale_wrt_gas=False)
        sums_2[0] += output.losses_M.detach().sum()
        if micro_step == MICRO_STEPS - 1:
            gradients = {name: sharded.gradient(parameter) for name, parameter in sharded.named_parameters()}
        engine.step()
    dist.all_reduce(sums_2, group=topology.dp_group)

    check = _Check(topology)
    for name, found in gradients.items():
        wanted = my_slice(plain.gradients[name], name, topology)
        found = torch.zeros_like(wanted) if found is None else found
        check.tensors(GRADIENT, name, found, wanted, SMALL * plain.norm)
    check.numbers(LOSS, "the update", float(sums_2[0] / sums_2[1]), plain.loss)
    # Nothing but the classification makes a wrong norm of right gradients.
    wrong = [
        name
        for name, parameter in sharded.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False) != (split_dim(name) is not None)
    ]
    for name in wrong or ["all parameters"]:
        check.numbers(NORM, name, sharded.grad_norm, plain.norm)
    for name, parameter in sharded.named_parameters():
        start, stop = sharded.partition(parameter)
        whole = my_slice(plain.after[name], name, topology).flatten()
        found = sharded.read(parameter, FP32).to(topology.device)
        check.tensors(WEIGHT, name, found, whole[start:stop], TOLERANCE * float(whole.norm()))
    return check.differences


def my_slice(full: torch.Tensor, name: str, topology: Topology) -> torch.Tensor:
    """This rank's part of a full parameter."""
    return tensor_slice(full, name, topology.tp_rank, topology.tp)


class _Check:
    """Collects what differs by more than it may, of the first kind of which anything does."""

    def __init__(self, topology: Topology) -> None:
        self.rank = topology.rank
        self.differences: list[Difference] = []

    def tensors(self, kind: str, name: str, found: torch.Tensor, wanted: torch.Tensor, least: float) -> None:
        """`least`: what two tensors may differ by whatever their size."""
        if found.shape != wanted.shape:  # the rest of the ranks must hear of it too
            self._add(kind, name, float(found.detach().norm()), float(wanted.norm()), math.inf)
            return
        difference, size = float((found.detach().float() - wanted).norm()), float(wanted.norm())
        if not difference <= max(TOLERANCE * size, least):  # a NaN differs
            self._add(kind, name, float(found.detach().norm()), size, difference / max(size, least))

    def numbers(self, kind: str, name: str, found: float, wanted: float) -> None:
        relative = abs(found - wanted) / abs(wanted)
        if not relative <= TOLERANCE:
            self._add(kind, name, found, wanted, relative)

    def _add(self, kind: str, name: str, found: float, wanted: float, relative: float) -> None:
        if all(difference.kind == kind for difference in self.differences):
            # So that sorting finds it first.
            relative = math.inf if math.isnan(relative) else relative
            self.differences.append(Difference(kind, name, found, wanted, relative, self.rank))


def _on(device: torch.device, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Language ids stay on the CPU: reading them from a GPU would wait for it.
    return {key: value if key == "lang_ids" else value.to(device) for key, value in given.items()}
