"""Run by each rank of a launch: X-MOD's updates against plain torch with an optimizer for each language.

Arguments: "quick" or "all", then the tensor-parallel sizes to go through.
"""

import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from xlscale.config import ConfigError
from xlscale.config_sections import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.data.loader import RankSlots
from xlscale.data.masking import IGNORE
from xlscale.data.stream import Batch
from xlscale.models.adapters import language_of
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights
from xlscale.parallel.sharded import FP32, KINDS, ShardedModel
from xlscale.parallel.tensor_parallel import tensor_slice
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw, group_of
from xlscale.training.update import forward_and_backward

LANGUAGES = ["en_XX", "de_DE", "fr_XX", "zh_CN", "sw_KE", "ar_AR"]
FLAGS = {  # the four combinations that were published
    "base": {},
    "pre-norm": {"pre_norm": True, "adapter_layer_norm": True, "adapter_reuse_layer_norm": False},
    "own norm": {"adapter_layer_norm": True, "adapter_reuse_layer_norm": False, "ln_before_adapter": False},
    "no norm": {"adapter_reuse_layer_norm": False, "ln_before_adapter": False},
}
OPTIMIZER = OptimizerConfig(learning_rate=0.003, weight_decay=0.1, eps=1e-3)
RUN, TOKENS, CLIP, UPDATES, SKIPPED = 2, 9, 0.5, 30, 6
FEW = 10
"""Updates of the cases that are not about the number of languages in a micro-step."""
MICRO_STEPS = 2
RELATIVE = 1e-5


def model_of(flags: str) -> ModelConfig:
    return ModelConfig(
        model_type="xmod", vocab_size=38, hidden_size=20, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=28, max_position_embeddings=13, initializer_range=0.2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, languages=LANGUAGES, adapter_reduction_factor=2, **FLAGS[flags],
    )  # fmt: skip


def config_of(topology: Topology, model: ModelConfig, languages: int, stage: int) -> Config:
    whole = RUN * languages
    return Config(
        training=TrainingConfig(
            total_steps=UPDATES,
            global_batch_size=MICRO_STEPS * whole,
            micro_batch_size=whole // topology.dp,
            precision="fp32",
            max_grad_norm=CLIP,
        ),
        parallel=ParallelConfig(tensor_parallel=topology.tp, zero_stage=stage),
        model=model,
        data=DataConfig(shards="-", tokenizer="-", language_run=RUN, languages_per_micro_step=languages),
        optimizer=OPTIMIZER,
        schedule=ScheduleConfig(warmup_steps=0),
    )


def batch_of(slots: np.ndarray) -> Batch:
    """What slots hold: ids and labels of the slot, one language for each run, half of them rare."""
    ids, labels, languages = [], [], []
    for slot in slots.tolist():
        rng = np.random.default_rng(slot)
        ids.append(rng.integers(2, 37, TOKENS))
        labels.append(np.where(rng.random(TOKENS) < 0.4, rng.integers(2, 37, TOKENS), IGNORE))
        languages.append(np.random.default_rng(10_000 + slot // RUN).choice(6, p=[0.3, 0.3, 0.2, 0.1, 0.07, 0.03]))
    return Batch(np.array(ids), np.array(labels), None, np.array(languages), slots)


def made(model: ModelConfig) -> MaskedLM:
    plain = MaskedLM(model)
    init_weights(plain, model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return plain


@dataclass(frozen=True)
class Case:
    flags: str
    languages: int
    """Of a micro-step."""
    stage: int = 3
    updates: int = FEW


CASES = {
    "quick": {
        1: [],
        2: [*(Case("base", languages, 3, UPDATES) for languages in (1, 2, 3)), Case("pre-norm", 2, 1)],
        4: [Case("pre-norm", 2, 3, UPDATES), Case("no norm", 3)],
    }
}
EVERY = [Case(flags, languages, 3, UPDATES) for flags in FLAGS for languages in (1, 2, 3)]
CASES["all"] = {ranks: [*EVERY, *(Case("pre-norm", 2, stage) for stage in range(3))] for ranks in (1, 2, 4)}
"""Which -> number of ranks -> the cases."""


@dataclass
class Plain:
    """One process, one optimizer for the trunk and one for each language."""

    model: ModelConfig
    per_micro_step: int
    updates: int
    losses: list[float] = field(default_factory=list)
    present: list[set[str]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> None:
        plain = made(self.model)
        optimizers = {}
        for language in ("", *LANGUAGES):
            members = [(name, p) for name, p in plain.named_parameters() if language_of(name) == language]
            decays = {"decay": OPTIMIZER.weight_decay, "no_decay": 0.0}
            groups = [
                {"params": [p for name, p in members if group_of(name) == kind], "weight_decay": decay}
                for kind, decay in decays.items()
            ]
            optimizers[language] = torch.optim.AdamW(
                groups, lr=OPTIMIZER.learning_rate, betas=tuple(OPTIMIZER.betas), eps=OPTIMIZER.eps
            )
        size = MICRO_STEPS * RUN * self.per_micro_step
        for update in range(self.updates):
            batch = batch_of(np.arange(update * size, (update + 1) * size))
            out = plain(
                torch.from_numpy(batch.input_ids),
                torch.from_numpy(batch.labels),
                lang_ids=torch.from_numpy(batch.languages),
            )
            loss = out.losses_M.mean()
            self.losses.append(loss.item())
            self.present.append({LANGUAGES[i] for i in batch.languages})
            if update != SKIPPED:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
                for language in ("", *self.present[-1]):
                    optimizers[language].step()
            plain.zero_grad(set_to_none=True)
        self.weights = {name: p.detach() for name, p in plain.named_parameters()}


def state(sharded: ShardedModel, language: str) -> list[torch.Tensor]:
    """All that an update of a language's adapters changes on this rank, as the forward pass has it too."""
    mine = [p for name, p in sharded.named_parameters() if language_of(name) == language]
    working = [(p.ds_tensor if hasattr(p, "ds_id") else p.data).clone() for p in mine]
    return working + [sharded.read(p, kind).clone() for p in mine for kind in KINDS]


def check(topology: Topology, case: Case) -> None:
    model = model_of(case.flags)
    wanted = Plain(model, case.languages, case.updates)
    wanted.run()
    config = config_of(topology, model, case.languages, case.stage)
    sharded = build(config, topology, adamw)
    start = dict(made(model).named_parameters())
    sharded.load(lambda _, name, first, last: start[name].detach()[first:last])
    training = config.training
    slots_of = RankSlots(
        topology.dp_rank, topology.dp, MICRO_STEPS, training.micro_batch_size, training.global_batch_size, RUN
    )
    what = f"{case}, dp{topology.dp} tp{topology.tp}"
    for update in range(case.updates):
        before = {language: state(sharded, language) for language in LANGUAGES}
        steps = sharded.language_steps
        hook = None
        if update == SKIPPED and topology.rank == topology.world_size - 1:
            hit = sorted(name for name, _ in sharded.named_parameters() if language_of(name) in wanted.present[update])[
                0
            ]
            hook = dict(sharded.named_parameters())[hit].register_hook(lambda gradient: gradient * torch.nan)
        batches = [batch_of(slots) for slots in slots_of(update)]
        passed = forward_and_backward(sharded, batches, LANGUAGES, seed=0, limit=None)
        sharded.engine.step()
        if hook is not None:
            hook.remove()
        error = abs(float(passed.loss) - wanted.losses[update]) / wanted.losses[update]
        assert error < RELATIVE, (what, update, error)
        trained = wanted.present[update] if update != SKIPPED else set()
        for language in LANGUAGES:
            same = [torch.equal(a, b) for a, b in zip(before[language], state(sharded, language), strict=True)]
            if language in trained:
                assert not all(same), (what, update, language)
            else:
                assert all(same), (what, update, language, "is not in the update, and not as it was")
            done = sharded.language_steps[language] - steps[language]
            assert done == (language in trained), (what, update, language)
    for name, parameter in sharded.named_parameters():
        first, last = sharded.partition(parameter)
        whole = tensor_slice(wanted.weights[name], name, topology.tp_rank, topology.tp)[: sharded.slices[parameter][0]]
        expected, found = whole.reshape(-1)[first:last], sharded.read(parameter, FP32)
        if "key.bias" not in name:  # its true gradient is zero: rounding, which Adam makes updates of
            error = (found - expected).norm().item()
            assert error <= RELATIVE * expected.norm().item() + 3e-8, (what, name, error, expected.norm().item())
    sharded.engine.destroy()
    print(f"{what}: is plain torch's", flush=True)


def refuses_different_languages(topology: Topology) -> None:
    """A schedule that is broken on one rank: all ranks say which languages, and none hangs."""
    model = model_of("base")
    sharded = build(config_of(topology, model, 1, 3), topology, adamw)
    start = dict(made(model).named_parameters())
    sharded.load(lambda _, name, first, last: start[name].detach()[first:last])
    last = topology.world_size - 1
    batch = batch_of(np.array([topology.dp_rank]))
    mine = Batch(batch.input_ids, batch.labels, None, np.array([3 if topology.rank == last else 1]), batch.slots)
    try:
        forward_and_backward(sharded, [mine], LANGUAGES, seed=0, limit=None)
    except ConfigError as error:
        assert "rank 0 has de_DE" in str(error) and f"rank {last} has zh_CN" in str(error), error
        print("different languages are refused", flush=True)
    sharded.engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for tp in map(int, sys.argv[2:]):
        with process_groups(tp) as topology:
            for case in CASES[sys.argv[1]][topology.world_size]:
                check(topology, case)
            if topology.world_size > 1:
                refuses_different_languages(topology)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
