"""Run by each rank of a launch: trains runs that go wrong, one after the other, and replays what they skipped.

Arguments: a folder with base.toml, and the names of the cases, keys of CASES. A run that ends with one line for people
leaves it in <folder>/<case>.stopped.<rank>; the lines of a replay are in <folder>/<case>.replayed.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

from xlscale.checkpoint.partition_file import file_entry, partition_file
from xlscale.checkpoint.store import MANIFEST, _seal
from xlscale.config import ConfigError, load_config
from xlscale.data.masking import IGNORE
from xlscale.data.stream import open_stream
from xlscale.parallel.sharded import FP32, ShardedModel
from xlscale.training import loop
from xlscale.training.metrics import read_metrics
from xlscale.training.replay import replay
from xlscale.training.update import Update, run_update

BATCH = 8
START = 4
"""The checkpoint of the run `plain` that is poisoned."""
LAST = 12
BIAS, MATRIX = "head.decoder.bias", "encoder.layers.0.mlp.up.weight"
WINDOW = 3


def poison(folder: Path, parameter: str, index: int, value: float, dp: int = 2) -> None:
    """Put `value` at a flat index of one parameter of a checkpoint written at tp = 1, and seal it again."""
    for dp_rank in range(dp):
        path = folder / partition_file(0, dp_rank)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        local = index - json.loads(metadata["starts"])[parameter]
        if not 0 <= local < tensors[f"fp32/{parameter}"].numel():
            continue
        tensors[f"fp32/{parameter}"][local] = value
        save_file(tensors, path, metadata=metadata)
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        manifest["files"][path.name] = file_entry(path)
        manifest["seal"] = _seal(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))


def copy_poisoned(root: Path, name: str, step: int, parameter: str, index: int, value: float) -> None:
    """Begin run `name` with a checkpoint of `plain` in which one number is changed."""
    if os.environ["RANK"] != "0":
        return
    folder = root / name / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(root / "plain" / "checkpoints" / folder.name, folder)
    poison(folder, parameter, index, value)


def labels_of(root: Path, update: int, *overrides: str) -> np.ndarray:
    """The labels [BATCH, T] of an update, numbered from 1."""
    stream = open_stream(load_config(root / "base.toml", overrides))
    return stream.batch(range((update - 1) * BATCH, update * BATCH)).labels


def lonely_label(root: Path) -> tuple[int, int]:
    """(update, piece): a piece that after START is predicted in that update only, by one data-parallel rank only.

    Rows 0, 1, 4, 5 are rank 0's at dp2 and micro-batches of 2.
    """
    seen = {update: labels_of(root, update) for update in range(START + 1, LAST + 1)}
    for update in range(START + 2, LAST - 2):
        for piece in np.unique(seen[update][seen[update] != IGNORE]):
            rows = np.nonzero((seen[update] == piece).any(1))[0]
            elsewhere = any((labels == piece).any() for other, labels in seen.items() if other != update)
            if not elsewhere and set(rows) <= {2, 3, 6, 7}:
                return update, int(piece)
    raise AssertionError("no such label; take another seed")


def spike(root: Path) -> tuple[int, float]:
    """(update, factor): the update of `plain` that stands highest above the mean before it, and the least factor
    by which it is no spike yet: its loss is not above the limit, and would be with the next smaller number."""
    losses = [record["loss"] for record in read_metrics(root / "plain")]
    means = {u: math.fsum(losses[u - 1 - WINDOW : u - 1]) / WINDOW for u in range(WINDOW + 1, LAST)}
    update = max(means, key=lambda u: losses[u - 1] / means[u])
    loss, mean = losses[update - 1], means[update]
    factor = loss / mean
    while factor * mean < loss:
        factor = math.nextafter(factor, math.inf)
    while math.nextafter(factor, 0.0) * mean >= loss:
        factor = math.nextafter(factor, 0.0)
    assert factor > 1.0, "no loss is above the mean before it; take another seed"
    return update, factor


SPARSE = ["masking.mlm_probability=0.03", "training.micro_batch_size=1"]


def sparse_label(root: Path) -> tuple[int, int]:
    """(update, piece) of an update whose last micro-step has no masked token on either rank, but an earlier one has."""
    for update in range(START + 1, LAST + 1):
        labels = labels_of(root, update, *SPARSE)
        early = labels[:6][labels[:6] != IGNORE]
        if (labels[6:] == IGNORE).all() and early.size:
            return update, int(early[0])
    raise AssertionError("no such update; take another probability")


def plain(root: Path, name: str) -> list[list[str]]:
    return [[f"training.stop_after={LAST}"]]


def nan(root: Path, name: str) -> list[list[str]]:
    copy_poisoned(root, name, START, MATRIX, 2000, math.nan)
    return [["faults.max_skipped=3", "faults.keep=2"]]


def infinite_loss(root: Path, name: str) -> list[list[str]]:
    """A bias of -inf: where its piece is the label the loss is infinite, and yet every gradient is finite."""
    copy_poisoned(root, name, START, BIAS, lonely_label(root)[1], -math.inf)
    return [[f"training.stop_after={LAST}"]]


def infinite_loss_resumed(root: Path, name: str) -> list[list[str]]:
    copy_poisoned(root, name, START, BIAS, lonely_label(root)[1], -math.inf)
    return [[f"training.stop_after={lonely_label(root)[0]}"], [f"training.stop_after={LAST}"]]


def infinite_loss_bf16(root: Path, name: str) -> list[list[str]]:
    copy_poisoned(root, name, START, BIAS, lonely_label(root)[1], -math.inf)
    return [["training.precision=bf16", f"training.stop_after={LAST}"]]


def empty_last_micro_step(root: Path, name: str) -> list[list[str]]:
    update, piece = sparse_label(root)
    copy_poisoned(root, name, update - 1, BIAS, piece, -math.inf)
    return [[*SPARSE, f"training.stop_after={update}"]]


def nothing_masked(root: Path, name: str) -> list[list[str]]:
    return [["masking.mlm_probability=1e-9", "training.stop_after=2"]]


def no_spike(root: Path, name: str) -> list[list[str]]:
    update, factor = spike(root)
    return [[f"faults.spike_factor={factor!r}", f"training.stop_after={update}"]]


def a_spike(root: Path, name: str) -> list[list[str]]:
    update, factor = spike(root)
    return [[f"faults.spike_factor={math.nextafter(factor, 0.0)!r}", f"training.stop_after={update + 1}"]]


def a_spike_resumed(root: Path, name: str) -> list[list[str]]:
    ((factor, _),) = a_spike(root, name)
    update, _ = spike(root)
    return [[factor, f"training.stop_after={stop}"] for stop in (update - 1, update, update + 1)]


def vocabulary_of_the_other_half(root: Path, name: str) -> list[list[str]]:
    """The same under dp2 x tp2: the poisoned row is one tensor-parallel rank's, the label one data-parallel rank's."""
    copy_poisoned(root, name, START, BIAS, lonely_label(root)[1], -math.inf)
    return [["parallel.tensor_parallel=2", f"training.stop_after={LAST}"]]


def nan_tensor_parallel(root: Path, name: str) -> list[list[str]]:
    copy_poisoned(root, name, START, MATRIX, 2000, math.nan)
    return [["parallel.tensor_parallel=2", "faults.max_skipped=3"]]


NORM = "encoder.layers.1.attention_norm.bias"
DRIFTS_AT = 3


def drifting(run_update: Callable[..., Update]) -> Callable[..., Update]:
    """run_update after which, in update DRIFTS_AT, one number of a LayerNorm is off on the last rank.

    By so much that the next update does not round it away.
    """

    def run(sharded: ShardedModel, *arguments: Any) -> Update:
        update = run_update(sharded, *arguments)
        if update.record["step"] == DRIFTS_AT and sharded.topology.rank == sharded.topology.world_size - 1:
            parameter = dict(sharded.named_parameters())[NORM]
            values = sharded.read(parameter, FP32).clone()
            values[0] *= 1 + 2**-12
            sharded.write(parameter, FP32, values)
        return update

    return run


def drift_before_a_checkpoint(root: Path, name: str) -> list[list[str]]:
    loop.run_update = drifting(run_update)
    return [["parallel.tensor_parallel=2", "parallel.drift_check_every=0", "checkpoint.every=2"]]


def drift_between_checkpoints(root: Path, name: str) -> list[list[str]]:
    loop.run_update = drifting(run_update)
    return [["parallel.tensor_parallel=2", "parallel.drift_check_every=3", "checkpoint.every=2"]]


CUT, ZEROED = "de_DE", "en_XX"
"""Languages of whose token shards the first is cut short, or has other bytes."""
BUDGET = 3


def damaged_tokens(root: Path, name: str) -> str:
    """The cache of the other runs, copied for the run `name` and damaged; gives the override."""
    cache = root / f"{name}-tokens"
    shutil.copytree(root / "tokens", cache)
    cut, zeroed = (min(cache.glob(f"*/{language}/*.tokens")) for language in (CUT, ZEROED))
    os.truncate(cut, cut.stat().st_size - 2)
    zeroed.write_bytes(bytes(zeroed.stat().st_size))
    return f"data.cache={cache}"


def damaged(root: Path, name: str) -> list[list[str]]:
    if os.environ["RANK"] == "0":
        damaged_tokens(root, name)
    return [[f"data.cache={root / f'{name}-tokens'}", f"training.stop_after={LAST}"]]


def damaged_and_over_the_budget(root: Path, name: str) -> list[list[str]]:
    ((cache, last),) = damaged(root, name)
    return [[cache, last, f"faults.max_replaced={BUDGET}"], [cache, last]]


def damaged_for_one_of_two(root: Path, name: str) -> list[list[str]]:
    """One of the ranks of each tensor-parallel pair reads damaged shards, the other good ones."""
    odd = int(os.environ["RANK"]) % 2
    cache = [damaged_tokens(root, f"{name}-{os.environ['RANK']}")] if odd else []
    return [[*cache, "parallel.tensor_parallel=2", f"training.stop_after={LAST}"]]


Case = Callable[[Path, str], list[list[str]]]
CASES: dict[str, Case] = {
    "plain": plain,
    "nan": nan,
    "inf": infinite_loss,
    "inf-resumed": infinite_loss_resumed,
    "inf-bf16": infinite_loss_bf16,
    "empty": empty_last_micro_step,
    "nothing": nothing_masked,
    "no-spike": no_spike,
    "spike": a_spike,
    "spike-resumed": a_spike_resumed,
    "drift-4": drift_before_a_checkpoint,
    "drift-3": drift_between_checkpoints,
    "damaged": damaged,
    "damaged-over": damaged_and_over_the_budget,
    "damaged-tp": damaged_for_one_of_two,
    "inf-tp": vocabulary_of_the_other_half,
    "nan-tp": nan_tensor_parallel,
}
REPLAYS = {"spike:dp2": [], "spike:tp2": ["parallel.tensor_parallel=2"], "nan:tp2": ["parallel.tensor_parallel=2"]}
"""<case>:<shape> -> overrides: the newest skipped update of the case, replayed."""


def next_port() -> None:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


if __name__ == "__main__":
    root, rank = Path(sys.argv[1]), os.environ["RANK"]
    for name in sys.argv[2:]:
        if name in REPLAYS:
            file = max((root / name.partition(":")[0] / "faults").iterdir())
            lines = replay(file, REPLAYS[name])
            if rank == "0":
                (root / f"{name}.replayed").write_text("\n".join(lines))
            next_port()
            continue
        loop.run_update = run_update
        for overrides in CASES[name](root, name):
            try:
                loop.train(load_config(root / "base.toml", [f"run.name={name}", *overrides]))
            except ConfigError as error:
                (root / f"{name}.stopped.{rank}").write_text(str(error))
            next_port()
