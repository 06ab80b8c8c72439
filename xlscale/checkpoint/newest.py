"""The newest whole checkpoint: what a run goes on from, and what is exported or replayed."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from xlscale.checkpoint.retention import folder_name, folders, point_at, remove_leftovers, set_aside
from xlscale.checkpoint.store import Checkpoint, OtherFormatError
from xlscale.config import ConfigError
from xlscale.parallel.sharded import KINDS
from xlscale.parallel.topology import Topology, gather_problems, raise_together

log = logging.getLogger(__name__)


def newest(
    root: Path, topology: Topology | None = None, up_to: int | None = None, kinds: Collection[str] = KINDS
) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, every file's digest checked; a broken one is named and passed over.

    With a topology all ranks call it, share the checking and get the same answer. up_to: the last step that may be.
    kinds: what will be read of the partitions.
    """
    return _first_whole(root, topology, up_to, kinds)[0]


def take_up(root: Path, topology: Topology) -> Checkpoint | None:
    """The checkpoint that a run goes on from, None for one that has none yet; `root` is made ready for the next ones.

    Broken ones that are newer are set aside. Raises ConfigError on all ranks when nothing but broken ones is there,
    for to start anew would throw the run away, and when `root` cannot be written into: the first save would be late
    to say so.
    """
    problems: list[str] = []
    if topology.is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(root)
            (root / ".written").touch()
            (root / ".written").unlink()
        except OSError as error:
            problems.append(f"checkpoints cannot be written into {root}: {error}; mend that, or set run.dir")
    raise_together(problems)
    checkpoint, broken = _first_whole(root, topology)
    if checkpoint is None and broken:
        raise ConfigError(
            [
                f"{root} has no whole checkpoint, all are broken: {', '.join(broken)}; bring one back, or set another "
                f"run.name to start anew"
            ]
        )
    if topology.is_main and checkpoint and broken:
        try:
            for name in broken:
                log.warning("%s is set aside as %s", root / name, set_aside(root / name).name)
            point_at(checkpoint.folder)
        except OSError as error:
            problems.append(f"{error}: a broken checkpoint cannot be set aside; rename it")
    raise_together(problems)
    return checkpoint


def _first_whole(
    root: Path, topology: Topology | None, up_to: int | None = None, kinds: Collection[str] = KINDS
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is as its manifest says, and the names of those before it."""
    rank, world = (topology.rank, topology.world_size) if topology else (0, 1)
    names = [path.name for path in folders(root) if up_to is None or path.name <= folder_name(up_to)]
    if topology:
        shared = [names]
        dist.broadcast_object_list(shared)
        names = shared[0]
    for number, name in enumerate(names):
        checkpoint, problems = None, []
        try:
            checkpoint = Checkpoint.open(root / name)
            files = sorted(checkpoint.manifest["files"])
            damaged = checkpoint.damaged(files[rank::world], kinds)
            problems = [f"{path} is damaged (its digest differs)" for path in damaged]
        except OtherFormatError:
            raise  # whole, and so on all ranks: an older one would be the wrong one
        except (ValueError, OSError) as error:
            problems = [str(error)]
        problems = gather_problems(problems) if topology else problems
        if not problems:
            return checkpoint, names[:number]
        if rank == 0:
            log.warning("checkpoint passed over: %s", "\n".join(problems))
    return None, names
