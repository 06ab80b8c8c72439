"""What a run starts from: its data, its newest checkpoint, or its first weights."""

import json
import logging
import os
import tomllib
from typing import Any

from xlscale.checkpoint.init_from import folder_rows
from xlscale.checkpoint.store import Checkpoint, versions
from xlscale.config import ConfigError, to_toml
from xlscale.config_deepspeed import leaves
from xlscale.config_sections import Config
from xlscale.data.stream import Stream, open_stream
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import Rows, ShardedModel
from xlscale.parallel.topology import Topology, raise_together
from xlscale.training.console import Console
from xlscale.training.data_faults import tell_left_out
from xlscale.training.faults import Faults
from xlscale.training.groups import group_problem
from xlscale.training.metrics import MetricsLog
from xlscale.training.probe import probe_problems
from xlscale.training.routing import adapters_of

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
            _check_model(stream, config)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    raise_together(problems)
    return open_stream(config) if stream is None else stream


def _check_model(stream: Stream, config: Config) -> None:
    """Refuse a model with fewer rows than the tokenizer has ids, or without an adapter for a language of the data."""
    if config.model.languages:
        adapters_of(stream.languages, config.model)
    if stream.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {stream.vocab_size} ids of the tokenizer "
            f"{config.data.tokenizer}; set it to {stream.vocab_size} or more"
        )


def stream_changes(checkpoint: Checkpoint | None, changes: list[str]) -> list[dict[str, Any]]:
    """All changes of a run's stream, with the updates done before each; a checkpoint's stream state keeps them."""
    if checkpoint is None:
        return []
    before: list[dict[str, Any]] = checkpoint.state("stream").get("changes", [])
    return [*before, {"step": checkpoint.step, "changes": changes}] if changes else before


def wanted_shares(stream: Stream, step: int) -> dict[str, float]:
    """Language -> share of the samples that it should have in update `step` (0-based)."""
    return dict(zip(stream.languages, map(float, stream.probabilities(step)), strict=True))


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
    if problem := group_problem(checkpoint, sharded, config):
        raise ValueError(problem)
    steps = checkpoint.manifest["optimizer_steps"], checkpoint.manifest["language_steps"]
    sharded.load(checkpoint.rows, *steps)
    if config.checkpoint.probe:
        changed = changes_since(checkpoint, config)
        raise_together(probe_problems(sharded, checkpoint.state("probe"), str(checkpoint.folder), changed))
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


def start_metrics(
    config: Config,
    sharded: ShardedModel,
    stream: Stream,
    checkpoint: Checkpoint | None,
    step: int,
    accepted: list[str],
) -> MetricsLog:
    """The run folder's config and metrics, with events that say what was started and what has changed since.

    accepted: how the stream differs from the checkpoint's.
    """
    topology = sharded.topology
    if topology.is_main:
        (config.run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
        (config.run_dir / "deepspeed.json").write_text(json.dumps(sharded.deepspeed_config, indent=1), encoding="utf-8")
    metrics = MetricsLog(config.run_dir, config, step, topology.is_main)
    changed = changes_since(checkpoint, config) if checkpoint else []
    metrics.event(
        "resume" if checkpoint else "start",
        step,
        dp=topology.dp,
        tp=topology.tp,
        world_size=topology.world_size,
        changed=changed,
        init_from="" if checkpoint else config.training.init_from,
        language_probabilities=wanted_shares(stream, step),
        versions=versions(),
    )
    if accepted:
        metrics.event("stream_changed", step, changes=accepted)
    tell_left_out(stream.tokens.faults, step, metrics)
    if checkpoint:
        total = config.training.total_steps
        log.info("resumed from %s: goes on at update %d of %d", checkpoint.folder, step + 1, total)
    if topology.is_main:
        for change in changed:
            log.warning("the config is not the checkpoint's: %s", change)
        for change in accepted:
            log.warning("the samples are not the checkpoint's, data.allow_changes allows it: %s", change)
    return metrics
