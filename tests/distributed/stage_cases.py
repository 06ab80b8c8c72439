"""Run by each rank of a launch: every ZeRO stage, precision and clipping against plain torch, step by step.

Arguments: a folder, then the tensor-parallel sizes to go through. At the first each case begins anew and writes a
checkpoint there, from which another stage goes on at the next size.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from xlscale.checkpoint.saver import save
from xlscale.checkpoint.store import Checkpoint
from xlscale.config_sections import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights
from xlscale.parallel.sharded import KINDS, MOMENTS, ShardedModel
from xlscale.parallel.tensor_parallel import split_dim, tensor_slice
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import NO_DECAY, adamw, group_of

# Widths that neither 2 nor 4 ranks divide: 37 pieces, rows of 20, biases of 20 and 28, 13 positions.
MODEL = ModelConfig(
    model_type="xlm-roberta", vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=28, max_position_embeddings=13, initializer_range=0.2, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
# eps near the gradients: else Adam makes whole updates of the rounding of an element whose gradient is nearly zero.
OPTIMIZER = OptimizerConfig(learning_rate=0.003, weight_decay=0.1, eps=1e-3)
SEQUENCES, UPDATES, MORE = 4, 3, 2
CLIP = 0.5
"""Norm that the first updates are clipped to, far below theirs; those after the checkpoint are not clipped."""
FP32, BF16 = (1e-5, 3e-8), (0.1, 2**-8)
"""Largest error of a tensor, as the norm of the difference: so much of its norm, and a rounding or two of a value of 1.

The second is for tensors that are nearly zero because larger terms cancel in them. bf16 rounds by up to 2^-9 at each
operation. A split product rounds otherwise, and so does ZeRO-3, whose linear layer rounds before it adds the bias and
whose hooks group the gradients that meet at a layer's input otherwise: gradients differ by some percent, and so do
weights, for Adam's first updates are nearly sign(gradient) * rate. At tp 1 below stage 3 nothing is reordered: there
the first update is as near as fp32's, as long as nobody sums gradients in bf16.
"""
LINEAR = torch.nn.functional.linear
"""torch's own: zero.Init replaces it for the whole process, as no run of one stage needs to mind."""
SOURCE = {0: 3, 1: 2, 2: 0, 3: 1}
"""Stage -> the stage whose checkpoint it goes on from, at another shape."""
OFFLOADED = {"bf16": (1, 2, 3), "fp32": ()}
"""Stages that two ranks also begin with the optimizer's state on the CPU: in bf16 its gradients live apart."""


def config_of(
    stage: int, precision: str, topology: Topology, clip: float, folder: Path, offload: str = "none"
) -> Config:
    """One sequence in each micro-step at any shape, so that bf16 rounds the same micro-steps everywhere."""
    return Config(
        training=TrainingConfig(
            total_steps=9, global_batch_size=SEQUENCES, micro_batch_size=1, precision=precision, max_grad_norm=clip
        ),
        parallel=ParallelConfig(tensor_parallel=topology.tp, zero_stage=stage, offload_optimizer=offload),
        model=MODEL,
        data=DataConfig(shards="-", tokenizer=str(folder / "tokenizer")),
        optimizer=OPTIMIZER,
        schedule=ScheduleConfig(warmup_steps=0),
    )


def batch(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels [4, 9] of one update, the same on every rank."""
    generator = torch.Generator().manual_seed(update)
    ids = torch.randint(2, 37, (SEQUENCES, 9), generator=generator)
    return ids, torch.randint(2, 37, ids.shape, generator=generator)


@dataclass
class Step:
    """What one update of plain torch does."""

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def model() -> MaskedLM:
    """The model on one process, every parameter noisy, so that none is made of updates only."""
    made = MaskedLM(MODEL)
    init_weights(made, MODEL, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def plain_torch(precision: str) -> list[Step]:
    """The updates of one process: fp32 weights, gradients and moments; forward and backward in the precision asked."""
    working = model()
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in working.named_parameters()}
    if precision == "bf16":
        working.bfloat16()
    optimizer = adamw(masters.items(), OPTIMIZER)
    steps = []
    for update in range(UPDATES + MORE):
        ids, labels = batch(update)
        losses = []
        for i in range(SEQUENCES):
            loss = working(ids[i : i + 1], labels[i : i + 1]).losses_M.mean() / SEQUENCES
            loss.backward()
            losses.append(loss.item())
            for name, parameter in working.named_parameters():
                assert parameter.grad is not None
                master = masters[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        gradients = {name: m.grad.clone() for name, m in masters.items() if m.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), CLIP if update < UPDATES else torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in working.named_parameters():
                parameter.copy_(masters[name])
        step = Step(losses, float(norm), gradients)
        step.weights = {name: master.detach().clone() for name, master in masters.items()}
        step.moments = {
            kind: {name: optimizer.state[m][kind].clone() for name, m in masters.items()} for kind in MOMENTS
        }
        steps.append(step)
    return steps


@dataclass(frozen=True)
class Case:
    sharded: ShardedModel
    stage: int
    precision: str

    @property
    def what(self) -> str:
        topology = self.sharded.topology
        return f"stage {self.stage} {self.precision} dp{topology.dp} tp{topology.tp}"

    def close(self, what: str, found: torch.Tensor, wanted: torch.Tensor, update: int) -> None:
        exact = update == 0 and self.stage < 3 and self.sharded.topology.tp == 1
        relative, absolute = FP32 if self.precision == "fp32" or exact else BF16
        assert found.shape == wanted.shape, (self.what, what, found.shape, wanted.shape)
        # The key's bias has a true gradient of zero: rounding, which Adam turns into updates.
        if "key.bias" not in what:
            error, norm = (found - wanted).norm().item(), wanted.norm().item()
            assert error <= relative * norm + absolute, (self.what, what, error, norm)

    def cut(self, name: str, full: torch.Tensor) -> torch.Tensor:
        topology = self.sharded.topology
        return tensor_slice(full, name, topology.tp_rank, topology.tp)

    def backward(self, update: int) -> list[float]:
        """All forwards and backwards of an update, and the step of all but the last; this rank's losses."""
        topology, engine = self.sharded.topology, self.sharded.engine
        mine = SEQUENCES // topology.dp
        ids, labels = batch(update)
        losses = []
        for i in range(topology.dp_rank * mine, (topology.dp_rank + 1) * mine):
            if losses:
                engine.step()
            loss = engine(ids[i : i + 1], labels[i : i + 1]).losses_M.mean() / SEQUENCES
            engine.backward(loss * topology.dp, scale_wrt_gas=False)
            losses.append(loss.item())
        return losses

    def update(self, number: int, wanted: Step) -> None:
        """One update: its losses, every gradient, the norm, the weights and the moments after it."""
        sharded = self.sharded
        losses = self.backward(number)
        first = sharded.topology.dp_rank * len(losses)
        expected = torch.tensor(wanted.losses[first : first + len(losses)])
        self.close(f"losses of update {number}", torch.tensor(losses), expected, number)
        for name, parameter in sharded.named_parameters():
            gradient = sharded.gradient(parameter)
            assert gradient is not None and gradient.dtype == torch.float32
            self.close(
                f"gradient of {name} in update {number}", gradient, self.cut(name, wanted.gradients[name]), number
            )
        sharded.engine.step()
        self.close(f"norm of update {number}", torch.tensor([sharded.grad_norm]), torch.tensor([wanted.norm]), number)

    def state(self, wanted: Step, steps: int) -> None:
        """Weights, moments and the steps done are plain torch's, and the working copies are the rounded weights."""
        sharded = self.sharded
        assert sharded.optimizer_steps == steps, (self.what, sharded.optimizer_steps, steps)
        for name, parameter in sharded.named_parameters():
            start, stop = sharded.partition(parameter)
            for kind, full in {"fp32": wanted.weights, **wanted.moments}.items():
                local = sharded.read(parameter, kind)
                assert local.dtype == torch.float32
                expected = self.cut(name, full[name]).reshape(-1)[start:stop]
                if kind == "exp_avg_sq":  # as Adam uses it; squares have twice the error
                    local, expected = local.sqrt(), expected.sqrt()
                self.close(f"{kind} of {name}", local, expected, steps - 1)
            partition = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data.view(-1)[start:stop]
            working = partition[: stop - start]
            assert working.dtype == (torch.bfloat16 if self.precision == "bf16" else torch.float32)
            assert torch.equal(working, sharded.read(parameter, "fp32").to(working.dtype)), (self.what, name)

    def same_as(self, checkpoint: Checkpoint) -> None:
        """Every bit that was saved is there again, whoever holds it now."""
        sharded = self.sharded
        for name, parameter in sharded.named_parameters():
            start, stop = sharded.partition(parameter)
            for kind in KINDS:
                saved = self.cut(name, checkpoint.full(name, kind)).reshape(-1)[start:stop]
                assert torch.equal(sharded.read(parameter, kind), saved), (self.what, kind, name)

    def reads_its_share(self, reading: "Reading") -> None:
        """Of each tensor this rank's rows were read, once, and with them the columns of the other slices, if any."""
        sharded = self.sharded
        for name, parameter in sharded.named_parameters():
            shape = sharded.full_shapes()[name]
            width, whole = prod(shape[1:]), prod(shape)
            start, stop = sharded.partition(parameter)
            share = (stop - start) * (sharded.topology.tp if split_dim(name) == 1 else 1)
            read, ends = reading.elements[name] / len(KINDS), 2 * (width - 1)  # of the first and the last row
            assert read <= min(share + ends, whole), (self.what, name, read, share)
        print(self.what, "reads its share", flush=True)

    def snapshot(self) -> list[torch.Tensor]:
        """Everything that an update changes."""
        sharded = self.sharded
        return [sharded.read(p, kind).clone() for _, p in sharded.named_parameters() for kind in KINDS]

    def skip(self, update: int, rank: int, parameter: str) -> None:
        """A NaN in one parameter's gradient on one rank: no rank applies anything, all count it, and go on well."""
        sharded = self.sharded
        before, skipped, steps = self.snapshot(), sharded.skipped_updates, sharded.optimizer_steps
        if sharded.topology.rank == rank:
            hit = dict(sharded.named_parameters())[parameter]
            hook = hit.register_hook(lambda gradient: gradient * torch.nan)
        self.backward(update)
        sharded.engine.step()
        if sharded.topology.rank == rank:
            hook.remove()
        assert sharded.skipped_updates == skipped + 1, (self.what, parameter, sharded.skipped_updates)
        assert not torch.tensor(sharded.grad_norm).isfinite(), (self.what, sharded.grad_norm)
        assert sharded.optimizer_steps == steps, self.what
        for one, other in zip(before, self.snapshot(), strict=True):
            assert torch.equal(one, other), (self.what, parameter)

    def decays(self) -> None:
        """The engine decays what it should, by the groups that it has; and they are in the manifest's words."""
        groups, names = self.sharded.groups(), self.sharded.group_names()
        for name, _ in self.sharded.named_parameters():
            decay = 0.0 if group_of(name) == NO_DECAY else OPTIMIZER.weight_decay
            wanted = {"weight_decay": decay, "betas": OPTIMIZER.betas, "eps": OPTIMIZER.eps}
            assert groups[names[name]] == wanted, (self.what, name, names[name], groups)
        print(self.what, "decays no norm and no bias", flush=True)


def begin(case: Case, steps: list[Step]) -> None:
    weights = dict(model().named_parameters())
    case.sharded.load(lambda _, name, first, last: weights[name].detach()[first:last])
    case.update(0, steps[0])
    case.state(steps[0], 1)
    last = case.sharded.topology.world_size - 1
    case.skip(7, last, "encoder.layers.0.mlp.up.weight")
    # Replicated: on the last tensor-parallel rank it is in no norm.
    case.skip(8, last, "encoder.layers.1.mlp_norm.weight")
    for number in range(1, UPDATES):
        case.update(number, steps[number])
    case.state(steps[UPDATES - 1], UPDATES)


@dataclass
class Reading:
    """A checkpoint that is read, and what is held of it."""

    checkpoint: Checkpoint
    elements: Counter[str] = field(default_factory=Counter)
    """Parameter -> elements read of it, of all kinds."""
    last: StorageWeakRef | None = None

    def rows(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        assert self.last is None or self.last.expired(), f"{name}: what was read before is still held"
        found = self.checkpoint.rows(kind, name, start, stop)
        self.elements[name] += found.numel()
        self.last = StorageWeakRef(found.untyped_storage())
        return found


def go_on(case: Case, steps: list[Step], checkpoint: Checkpoint) -> None:
    reading, sharded = Reading(checkpoint), case.sharded
    sharded.load(reading.rows, checkpoint.manifest["optimizer_steps"])
    case.reads_its_share(reading)
    case.decays()
    case.same_as(checkpoint)
    case.update(UPDATES, steps[UPDATES])
    case.skip(9, 1, "head.norm.bias")
    for number in range(UPDATES + 1, UPDATES + MORE):
        case.update(number, steps[number])
    case.state(steps[-1], UPDATES + MORE)


def run(topology: Topology, folder: Path, first: bool, reference: dict[str, list[Step]]) -> None:
    for precision, steps in reference.items():
        offloaded = OFFLOADED[precision] if first and topology.world_size == 2 else ()
        for stage, offload in [*((stage, "none") for stage in range(4)), *((stage, "cpu") for stage in offloaded)]:
            config = config_of(stage, precision, topology, CLIP if first else 0.0, folder, offload)
            torch.nn.functional.linear = LINEAR
            case = Case(build(config, topology, adamw), stage, precision)
            if first:
                begin(case, steps)
                if offload == "none":
                    save(folder / f"{precision}-{stage}", case.sharded, config, UPDATES, 0, {})
            else:
                checkpoint = Checkpoint.open(folder / f"{precision}-{SOURCE[stage]}" / f"step-{UPDATES:08d}")
                go_on(case, steps, checkpoint)
            case.sharded.engine.destroy()
            print(case.what, "is plain torch's", flush=True)


def through(root: Path, sizes: list[int]) -> None:
    """All cases at each tensor-parallel size, in process groups of their own."""
    reference = {precision: plain_torch(precision) for precision in ("fp32", "bf16")}
    for number, size in enumerate(sizes):
        with process_groups(size) as topology:
            run(topology, root, number == 0, reference)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    through(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
