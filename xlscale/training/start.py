"""What a run starts from: its data, its newest checkpoint, or its first weights."""

import logging
import os
import tomllib

from xlscale.checkpoint.init_from import folder_rows
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import ConfigError, to_toml
from xlscale.config_deepspeed import leaves
from xlscale.config_sections import Config
from xlscale.data.stream import Stream, open_stream
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import Rows, ShardedModel
from xlscale.parallel.topology import Topology, raise_together
from xlscale.training.console import Console
from xlscale.training.faults import Faults

log = logging.getLogger(__name__)


def threads_per_process() -> int:
    """CPU threads of torch in this process, when the config does not say."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, (os.cpu_count() or 1) // local)


def open_stream_together(config: Config, topology: Topology, console: Console) -> Stream:
    """The stream over the token shards, which the main process derives first where they are not there yet."""
    problems: list[str] = []
    stream: Stream | None = None
    if topology.is_main:
        try:
            stream = open_stream(config, console.step("tokenising"))
            _check_vocabulary(stream, config)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    raise_together(problems)
    return open_stream(config) if stream is None else stream


def _check_vocabulary(stream: Stream, config: Config) -> None:
    """Refuse a model with fewer rows than the tokenizer has ids."""
    if stream.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {stream.vocab_size} ids of the tokenizer "
            f"{config.data.tokenizer}; set it to {stream.vocab_size} or more"
        )


def check_fits(checkpoint: Checkpoint, config: Config, stream: Stream) -> None:
    """Refuse to go on from a checkpoint of another model, stream or batch."""
    slot = config.training.global_batch_size * checkpoint.step
    if checkpoint.manifest["slot"] != slot:
        raise ValueError(
            f"{checkpoint.folder} stands at slot {checkpoint.manifest['slot']}, but {checkpoint.step} updates of "
            f"training.global_batch_size={config.training.global_batch_size} end at {slot}; keep a run's batch size"
        )
    stream.check_state(checkpoint.state("stream"))


def changes_since(checkpoint: Checkpoint, config: Config) -> list[str]:
    """What the config says otherwise than when the checkpoint was written; allowed, but never silent."""
    texts = ((checkpoint.folder / "config.toml").read_text(encoding="utf-8"), to_toml(config))
    before, now = (dict(leaves(tomllib.loads(text))) for text in texts)
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]


def resume_faults(config: Config, checkpoint: Checkpoint | None) -> Faults:
    """The skipped updates so far; ConfigError when the run stopped for them and nothing was done about it."""
    faults = Faults(config.faults, checkpoint.state("faults") if checkpoint else {})
    if checkpoint is None:
        return faults
    settled = faults.settled
    if problem := faults.start_again(checkpoint.step, changes_since(checkpoint, config)):
        raise ConfigError(
            [f"{checkpoint.folder}: {problem}; raise faults.max_skipped, or lower optimizer.learning_rate"]
        )
    if faults.settled > settled:
        log.info("the config was changed after the run had stopped: skipped updates are counted from here anew")
    return faults


def load_weights(sharded: ShardedModel, checkpoint: Checkpoint | None, config: Config) -> int:
    """Fill the model from the checkpoint, or with its first weights; returns the updates already done."""
    shapes = sharded.full_shapes()
    if checkpoint is None:
        _load_first_weights(sharded, config)
        return 0
    saved = {name: tuple(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    wrong = [name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{checkpoint.folder} is of another model: {name} is {saved.get(name)} there and {shapes.get(name)} by "
            f"[model]; restore [model], or set another run.name ({len(wrong)} parameters differ)"
        )
    sharded.load(checkpoint.rows, checkpoint.manifest["optimizer_steps"])
    return checkpoint.step


def _load_first_weights(sharded: ShardedModel, config: Config) -> None:
    """Fill the model from the Hub folder training.init_from, or from the seed."""
    model, seed = config.model, config.training.seed
    shapes = sharded.full_shapes()
    if not config.training.init_from:
        sharded.load(lambda kind, name, start, stop: initial_rows(name, shapes[name], model, seed, start, stop))
        return
    problems: list[str] = []
    rows: Rows | None = None
    try:
        rows = folder_rows(config, problems)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    raise_together(problems)
    assert rows is not None
    sharded.load(rows)
    raise_together(problems)  # what only the rank that read it knows
    log.info("first weights read from %s", config.training.init_from)
