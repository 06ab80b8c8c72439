"""The cases of the parity grid, and the worker that runs them: updates of a tiny model at every way of parallelism.

Run by each rank of a launch. Arguments: config files, each in a folder of its case's name; those of one tensor-parallel
size stand together and share their process groups. Each rank leaves findings-<rank>.pt in the run folder, and all
together a run folder; a case that fails on all ranks leaves its traceback there and the next one runs.
"""

import gc
import itertools
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlscale.config import load_config
from xlscale.config_sections import Config
from xlscale.parallel import zero
from xlscale.parallel.drift import drifted
from xlscale.parallel.guards import check_parameters
from xlscale.parallel.sharded import KINDS, ShardedModel
from xlscale.parallel.tensor_parallel import prepare_parameters, split_dim
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training import loop
from xlscale.training.console import Console
from xlscale.training.signals import Signals
from xlscale.training.watchdog import Watchdog

UPDATES = 10
DROPOUT_UPDATES = 20
UNCOUNTED = "encoder.embeddings.word.weight"
"""The parameter that a wrong-norm case takes for a replicated one."""


@dataclass(frozen=True)
class Case:
    """One way of running one model."""

    model: str
    """"xl" (pre-LN) or "post" (post-LN)."""
    dp: int
    tp: int
    stage: int
    sequence_parallel: bool = False
    checkpointing: int = 0
    precision: str = "fp32"
    dropout: bool = False
    wrong_norm: bool = False
    """Whether one parameter's gradient-norm attribute is wrong, and the guard against it away."""

    @property
    def name(self) -> str:
        parts = [self.model, f"dp{self.dp}-tp{self.tp}", f"zero{self.stage}"]
        flags = {"sp": self.sequence_parallel, "ckpt": self.checkpointing, "bf16": self.precision == "bf16",
                 "dropout": self.dropout, "wrong": self.wrong_norm}  # fmt: skip
        return "-".join([*parts, *(flag for flag, on in flags.items() if on)])


SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
EXACT = [
    Case(model, dp, tp, stage, sequence_parallel, checkpointing)
    for (dp, tp), model, stage, sequence_parallel, checkpointing in itertools.product(
        SHAPES, ("xl", "post"), (1, 3), (False, True), (0, 1)
    )
    if tp > 1 or not sequence_parallel
]
"""fp32 without dropout: each agrees with plain torch."""
BF16 = [
    Case("post", 2, 1, 1, checkpointing=1, precision="bf16"),
    Case("xl", 1, 2, 3, sequence_parallel=True, precision="bf16"),
    Case("xl", 2, 2, 1, sequence_parallel=True, checkpointing=1, precision="bf16"),
    Case("post", 2, 2, 3, precision="bf16"),
    Case("xl", 1, 4, 3, precision="bf16"),
]
WRONG_NORM = Case("xl", 1, 2, 3, precision="bf16", wrong_norm=True)
DROPOUT = [
    Case(model, dp, 2, stage, sequence_parallel, checkpointing, dropout=True)
    for (model, dp, stage), sequence_parallel, checkpointing in itertools.product(
        [("xl", 1, 3), ("post", 2, 1)], (False, True), (0, 1)
    )
]
CASES = [*EXACT, *BF16, WRONG_NORM, *DROPOUT]
SLOW = [
    case
    for case in EXACT
    if (case.dp * case.tp == 4 and case.stage == 1)
    or (case.tp > 1 and case.sequence_parallel != bool(case.checkpointing))
]
"""Left to the slow tests: four processes at stage 1, which test_stages.py has too, and what is split with one of
sequence parallelism and recomputation; both and neither stay."""

BATCH = 8
MODELS: dict[str, dict[str, Any]] = {
    "xl": {"model.model_type": "xlm-roberta-xl"},
    # No tensor-parallel size but 1 divides this vocabulary.
    "post": {"model.model_type": "xlm-roberta", "model.vocab_size": 603},
}


def config_changes(case: Case) -> dict[str, Any]:
    """What a case sets, over conftest.BASE."""
    dropout = 0.1 if case.dropout else 0.0
    return MODELS[case.model] | {
        "training.total_steps": DROPOUT_UPDATES if case.dropout else UPDATES,
        "training.global_batch_size": BATCH,
        "training.micro_batch_size": BATCH // (2 * case.dp),
        "training.max_grad_norm": 2.0,
        "training.precision": case.precision,
        "training.activation_checkpointing": case.checkpointing,
        "parallel.tensor_parallel": case.tp,
        "parallel.zero_stage": case.stage,
        "parallel.sequence_parallel": case.sequence_parallel,
        "model.hidden_dropout_prob": dropout,
        "model.attention_probs_dropout_prob": dropout,
        "parallel.self_check": False,  # test_self_check.py; here it would take a third of the time
    }


def wrongly_prepared(model: torch.nn.Module, topology: Topology, sequence_parallel: bool) -> None:
    """As prepare_parameters, but one split parameter is taken for a whole one."""
    prepare_parameters(model, topology, sequence_parallel)
    dict(model.named_parameters())[UNCOUNTED].tensor_model_parallel = False


def watch(sharded: ShardedModel, updates: int, findings: dict[str, Any]) -> None:
    """Put into `findings` what this rank sees of the coming `updates` updates."""
    engine, step, done = sharded.engine, sharded.engine.step, itertools.count()

    def watched() -> None:
        if not engine.is_gradient_accumulation_boundary():
            step()
            return
        update = next(done)
        if update in (0, updates - 1):
            found = ((name, sharded.gradient(p)) for name, p in sharded.named_parameters())
            findings["gradients"][update] = {name: g.detach().clone() for name, g in found if g is not None}
        step()
        if update == updates - 1:
            findings["drifted"], findings["replicated"] = drifted(sharded), replicated(sharded)

    engine.step = watched


def run_case(config: Config, topology: Topology) -> dict[str, Any]:
    """The run of one case, by the training loop itself, and what this rank has seen of it."""
    findings: dict[str, Any] = {"gradients": {}}

    def watched(*arguments: Any) -> ShardedModel:
        sharded = build(*arguments)
        watch(sharded, config.training.total_steps, findings)
        return sharded

    loop.build = watched
    config.run_dir.mkdir(parents=True, exist_ok=True)
    watchdog = Watchdog(config.training.hang_seconds, config.run_dir, topology.rank)
    with Console(config.run_dir, topology.is_main) as console, Signals(0.0) as signals, watchdog:
        loop._train(config, topology, console, signals, watchdog)
    return findings


def replicated(sharded: ShardedModel) -> dict[str, torch.Tensor]:
    """What this rank holds of every replicated parameter: its partitions, and the copy that the forward uses."""
    found = {}
    for name, parameter in sharded.named_parameters():
        if split_dim(name) is None:
            for kind in KINDS:
                found[f"{kind}/{name}"] = sharded.read(parameter, kind).clone()
            found[f"whole/{name}"] = parameter.data.clone()
            if hasattr(parameter, "ds_tensor"):
                start, stop = sharded.partition(parameter)
                found[f"working/{name}"] = parameter.ds_tensor[: stop - start].clone()
    return found


def run_configs(paths: list[Path], topology: Topology) -> None:
    by_name = {case.name: case for case in CASES}
    for path in paths:
        config = load_config(path)
        wrong = by_name[path.stem].wrong_norm
        zero.prepare_parameters = wrongly_prepared if wrong else prepare_parameters
        zero.check_parameters = (lambda *_: None) if wrong else check_parameters
        findings: dict[str, Any]
        try:
            findings = run_case(config, topology)
        except Exception:
            findings = {"error": traceback.format_exc()}
        config.run_dir.mkdir(parents=True, exist_ok=True)
        torch.save(findings, config.run_dir / f"findings-{topology.rank}.pt")
        print(path.stem, findings.get("error", "done"), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every build of the engine collects garbage: among all that was imported it takes a third of its time
    for tp, paths in itertools.groupby(map(Path, sys.argv[1:]), lambda p: load_config(p).parallel.tensor_parallel):
        with process_groups(tp) as topology:
            run_configs(list(paths), topology)
        # So that no group waits for the last one's socket.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
