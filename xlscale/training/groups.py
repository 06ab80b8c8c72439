"""The optimizer's groups: a run goes on with those that it was saved with, unless the config says otherwise."""

import tomllib
from typing import Any

from xlscale.checkpoint.store import Checkpoint, versions
from xlscale.config_sections import Config
from xlscale.parallel.sharded import HYPERPARAMETERS, ShardedModel


def group_problem(checkpoint: Checkpoint, sharded: ShardedModel, config: Config) -> str:
    """A line that names a parameter whose hyper-parameters have changed and no field of [optimizer] has; else empty.

    A group of the old name whose value was the old config's and is the new one's follows a changed field. Of an
    imported checkpoint nobody may have said what the groups were.
    """
    saved: dict[str, dict[str, Any]] = checkpoint.manifest.get("groups", {})
    if not saved:
        return ""
    before = tomllib.loads((checkpoint.folder / "config.toml").read_text(encoding="utf-8"))["optimizer"]
    live, names = sharded.groups(), sharded.group_names()
    wrong = []
    for name, entry in checkpoint.manifest["parameters"].items():
        was, now = entry["group"], names.get(name)
        for key in HYPERPARAMETERS:
            old, new = saved.get(was, {}).get(key), live.get(now or "", {}).get(key)
            follows = was == now and old == before[key] and new == getattr(config.optimizer, key)
            if old != new and not follows:
                wrong.append(f"{name}: {key} was {old} (group {was}) and is {new} (group {now})")
    if not wrong:
        return ""
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    wrote = checkpoint.manifest["versions"]["xlscale"]
    return (
        f"{checkpoint.folder}: the optimizer would go on otherwise than it was saved: {wrong[0]}{more}; no field of "
        f"[optimizer] says so: restore xlscale {wrote}, which wrote it (this is {versions()['xlscale']}), or "
        "what makes the groups (xlscale/training/optimizer.py)"
    )
