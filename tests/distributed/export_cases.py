"""Run by each rank of a launch: runs that export, whole and with something wrong between the writing and the check.

Arguments: config files. The name of each is a case of FAULTS, or any other for a run without a fault. What a run was
refused with is in <run>/refused-<rank>.txt.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from xlscale.checkpoint import export
from xlscale.checkpoint.hub import HubWriter
from xlscale.config import ConfigError, load_config
from xlscale.parallel.sharded import FP32, ShardedModel
from xlscale.training.loop import train

WRONG = "encoder.layers.1.mlp.down.weight"
"""Cut along columns, so that its parts lie strewn over the whole."""


def flip_a_bit_of_a_file(writer: HubWriter, mine: list[str], sharded: ShardedModel) -> None:
    """As a disk or the memory of one machine would: the last bit of the last element."""
    for file in mine:
        if WRONG in writer.files[file]:
            with (writer.beside / file).open("r+b") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                _, end = json.loads(opened.read(size))[writer.names[WRONG]]["data_offsets"]
                opened.seek(8 + size + end - 4)
                byte = opened.read(1)[0]
                opened.seek(-1, 1)
                opened.write(bytes([byte ^ 1]))


def change_a_weight(writer: HubWriter, mine: list[str], sharded: ShardedModel) -> None:
    """Since the checkpoint was written, on the last rank: the last bit of one element."""
    last = sharded.topology.rank == sharded.topology.world_size - 1
    for name, parameter in sharded.named_parameters():
        if name == WRONG:
            values = sharded.read(parameter, FP32).clone()
            values.view(torch.int32)[-1] ^= int(last)
            sharded.write(parameter, FP32, values)


FAULTS: dict[str, Callable[[HubWriter, list[str], ShardedModel], None]] = {
    "flipped": flip_a_bit_of_a_file,
    "changed": change_a_weight,
}
check = export._verify


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        fault = FAULTS.get(path.stem)

        def verify(writer: HubWriter, mine: list[str], sharded: ShardedModel, fault=fault) -> None:  # type: ignore[no-untyped-def]
            if fault:
                fault(writer, mine, sharded)
            check(writer, mine, sharded)

        export._verify = verify
        config = load_config(path)
        try:
            train(config)
        except ConfigError as error:
            (config.run_dir / f"refused-{os.environ['RANK']}.txt").write_text(str(error))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


if __name__ == "__main__":
    main()
