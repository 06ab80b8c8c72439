"""Run by each rank of a launch: a sharded model takes its first weights from a Hub folder and is saved untrained.

Arguments: config files. Beside each checkpoint stands what each rank has read, and the scores of a head that is loaded
into the engine: read-<rank>.json and labels-<rank>.pt in the run's folder.
"""

import json
import os
import sys

import torch

from xlscale.checkpoint.hub_folder import HubFolder
from xlscale.checkpoint.init_from import folder_rows
from xlscale.checkpoint.saver import save
from xlscale.config import load_config
from xlscale.models.heads import HEADS
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw
from xlscale.training.start import load_weights

HEAD = "ForSequenceClassification"
IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 8, 2, 1]])


def sizes(sharded: ShardedModel) -> dict[str, int]:
    """Elements of each parameter that this rank keeps."""
    return {name: len(range(*sharded.partition(parameter))) for name, parameter in sharded.named_parameters()}


def run(path: str, topology: Topology) -> None:
    config = load_config(path)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    read: dict[str, int] = {}
    real = HubFolder.rows

    def counted(opened: HubFolder, name: str, start: int, stop: int) -> torch.Tensor:
        found = real(opened, name, start, stop)
        read[name] = read.get(name, 0) + found.numel()
        return found

    HubFolder.rows = counted  # type: ignore[method-assign]
    sharded = build(config, topology, adamw)
    assert load_weights(sharded, None, config) == 0
    (config.run_dir / f"read-{topology.rank}.json").write_text(json.dumps({"read": read, "kept": sizes(sharded)}))
    save(config.run_dir / "checkpoints", sharded, config, 0, 0, {})
    sharded.engine.destroy()

    labelled = build(config, topology, adamw, HEADS[HEAD])
    problems: list[str] = []
    labelled.load(folder_rows(config, problems, HEAD))
    assert not problems
    labelled.engine.eval()
    with torch.no_grad():
        logits = labelled.engine(IDS, (IDS != 1).long()).logits
    torch.save(logits.float(), config.run_dir / f"labels-{topology.rank}.pt")
    labelled.engine.destroy()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        torch.set_num_threads(1)
        with process_groups(load_config(path).parallel.tensor_parallel) as topology:
            run(path, topology)
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
