"""What a run leaves to be looked at: metrics.jsonl, events.jsonl, wandb, and one log line of fixed columns.

metrics.jsonl holds one object per update and no step twice: what a killed run wrote past its last checkpoint
is cut off when the run goes on from there. events.jsonl is the history: nothing is ever cut from it.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from xlscale.config import ConfigError
from xlscale.config_sections import Config
from xlscale.data.shards import disk_is_full, write_atomically

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
WANDB_ID = "wandb_run_id"
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 30.0
# Whatever wandb raises, the run is worth more; SystemExit because its helpers exit at times.
FAILURES = (Exception, SystemExit)


class MetricsLog:
    """Writer of a run's metrics and events on the main process; on the others every call does nothing.

    `resumed_step` is the number of updates done before this start: records past it are dropped.
    """

    def __init__(self, run_dir: Path, config: Config, resumed_step: int, is_main: bool):
        self.is_main = is_main
        self._last_step = resumed_step
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        last = _cut(run_dir / METRICS, resumed_step)
        if last < resumed_step:
            log.warning(
                "%s has no records of steps %d to %d: they were lost before this start",
                run_dir / METRICS,
                last + 1,
                resumed_step,
            )
        _cut(run_dir / EVENTS, None)
        self._metrics, self._events = _Lines(run_dir / METRICS), _Lines(run_dir / EVENTS)
        self._wandb = _Wandb(run_dir, config)

    def update(self, record: Mapping[str, Any]) -> None:
        """Appends the record of one update; `step`, the number of finished updates, is the last one's + 1."""
        if not self.is_main:
            return
        assert record["step"] == self._last_step + 1, (record["step"], self._last_step)
        self._last_step = record["step"]
        self._metrics.append(record)
        self._wandb.log(record)

    def event(self, event: str, step: int, **details: Any) -> None:
        """Appends "start", "resume", "checkpoint", "export", "skip", "stop" and the like; then all is on the disk."""
        if not self.is_main:
            return
        self._events.append({"time": time.time(), "step": step, "event": event, **details})
        self.sync()

    def sync(self) -> None:
        """Have all on the disk."""
        if self.is_main:
            for lines in (self._metrics, self._events):
                lines.sync()

    def close(self) -> None:
        """Ends wandb's run, within a bounded time, and closes the files."""
        if self.is_main:
            self._wandb.finish()
            self._metrics.close()
            self._events.close()


def stop(metrics: MetricsLog, step: int, problem: str) -> NoReturn:
    """End the run after update `step`, on all ranks alike."""
    metrics.event("stop", step, reason=problem)
    metrics.close()
    raise ConfigError([f"stopped after update {step}: {problem}"])


def append_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """An event by a file of its own, for a thread whose MetricsLog may be in the hands of one that hangs."""
    lines = _Lines(run_dir / EVENTS)
    lines.append({"time": time.time(), "step": step, "event": event, **details})
    lines.sync()
    lines.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run in order; a last line that is cut short is left out with a warning."""
    return _read(run_dir / METRICS)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run in order; a last line that is cut short is left out with a warning."""
    return _read(run_dir / EVENTS)


def log_line(record: Mapping[str, Any]) -> str:
    """The log line of one update, in fixed columns; what the record lacks is a dash."""

    def column(name: str, key: str, form: Callable[[Any], str], width: int) -> str:
        value = record.get(key)
        return f"{name} {'-' if value is None else form(value):>{width}}"

    columns = [
        column("step", "step", lambda v: f"{v:05d}", 5),
        column("loss", "loss", lambda v: f"{v:.3f}", 6),
        column("gnorm", "grad_norm", lambda v: f"{v:.2f}", 6),
        column("lr", "learning_rate", lambda v: f"{v:.1e}", 7),
        column("tok/s", "tokens_per_second", short, 5),
        *([column("mfu", "mfu", lambda v: f"{v:.1%}", 5)] if "mfu" in record else []),
        column("lang", "loss_per_language", lambda v: str(len(v)), 3),
        column("mem", "memory_gib", lambda v: f"{v:.1f}GiB", 8),
    ]
    if record.get("skipped_updates"):
        columns.append(f"skipped {record['skipped_updates']}")
    return "  ".join(columns)


def short(number: float) -> str:
    """A number in three significant digits at most: 950, 4.12k, 412k, 1.2M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000.0
    digits = 0 if abs(number) >= 99.95 or not unit else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


class _Wandb:
    """The run in wandb. Never asks and never stops the run: what fails is said once and goes without."""

    def __init__(self, run_dir: Path, config: Config):
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE", config.logging.wandb)
        if mode == "disabled":
            return
        if mode == "online":
            try:
                self._run = _start_wandb(run_dir, config, "online")
                return
            except FAILURES as error:
                way = "it writes offline files instead, `wandb sync` sends them"
                log.warning("wandb is not online (%s); %s", _reason(error), way)
        with self._never_fail("start"):
            self._run = _start_wandb(run_dir, config, "offline")

    def log(self, record: Mapping[str, Any]) -> None:
        if self._run is not None:
            with self._never_fail("logging"):
                self._run.log(dict(_flat(record)), step=record["step"])

    def finish(self) -> None:
        if self._run is not None:
            with self._never_fail("finish"):
                self._run.finish()
            self._run = None

    @contextlib.contextmanager
    def _never_fail(self, doing: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self._run = None
            reason = _reason(error)
            log.warning("wandb is off from here: its %s failed (%s); metrics.jsonl has everything", doing, reason)


def _start_wandb(run_dir: Path, config: Config, mode: Literal["online", "offline"]) -> Any:
    import wandb

    # What an earlier try left in wandb's service would hold the run's id.
    wandb.teardown()
    # A silent wandb takes itself to be without a terminal, so it cannot ask for a key.
    wandb.setup(wandb.Settings(silent=True, quiet=True))
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.run.name,
        id=_wandb_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        config=dataclasses.asdict(config),
        settings=wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            disable_git=True,
            save_code=False,
            init_timeout=WANDB_INIT_SECONDS,
            finish_timeout=WANDB_FINISH_SECONDS,
        ),
    )


def _reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _wandb_id(run_dir: Path) -> str:
    """The run's id in wandb, made once and kept in its folder, so that it goes on in its own curves."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomically(path, (secrets.token_hex(4) + "\n").encode())
    return path.read_text(encoding="utf-8").strip()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


class _Lines:
    """A file of JSON lines. What a full disk does not take is kept, and goes before what is written next."""

    def __init__(self, path: Path):
        self._path, self._file, self._pending = path, path.open("ab", buffering=0), b""

    def append(self, record: Mapping[str, Any]) -> None:
        said = bool(self._pending)
        self._pending += (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not disk_is_full(error):
                raise
            if not said:
                log.warning("%s: the disk is full, its lines are kept until there is room: %s", self._path, error)

    def sync(self) -> None:
        """Have what was written on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if not disk_is_full(error):
                raise

    def close(self) -> None:
        if self._pending:
            log.warning("%s lacks its last %d bytes, the disk was full to the end", self._path, len(self._pending))
        self._file.close()


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: 0-d tensors and numpy numbers as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is not a JSON object; remove that line or restore the file"
            ) from None
    if rest:
        log.warning("%s: 1 last line was cut short and is left out", path)
    return records


def _cut(path: Path, after: int | None) -> int:
    """Drops the records of steps past `after` (None: none) and a line cut short; gives the last step kept."""
    records = _read(path)
    kept = [record for record in records if after is None or record["step"] <= after]
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    if len(kept) < len(records) or cut_short:
        write_atomically(path, ("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)).encode())
    return kept[-1]["step"] if kept else 0
