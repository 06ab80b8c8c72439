"""`xlscale deepspeed ...`: checkpoints of DeepSpeed itself, in and out."""

import logging
from pathlib import Path
from typing import Annotated

import typer

deepspeed = typer.Typer(
    name="deepspeed", help="Checkpoints of DeepSpeed itself, in and out.", no_args_is_help=True, rich_markup_mode=None
)


@deepspeed.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder that save_checkpoint wrote into, or a tag's in it.")
    ],
    config: Annotated[Path, typer.Argument(help="TOML file of the run that is to go on from it.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoints to write it into, as runs/run/checkpoints.")],
    dp: Annotated[int, typer.Option(help="Data-parallel ranks to write files for; 0 = as many as SRC has.", min=0)] = 0,
    tp: Annotated[
        int, typer.Option(help="Tensor-parallel ranks to write files for; 0 = as many as CONFIG says.", min=0)
    ] = 0,
    slot: Annotated[
        int | None,
        typer.Option(help="Samples that count as seen; by default SRC's updates times training.global_batch_size."),
    ] = None,
    unsafe_pickle: Annotated[
        bool, typer.Option("--unsafe-pickle", help="Read files that ask for more than tensors too: their code runs.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated."),
    ] = None,
) -> None:
    """Make a checkpoint of ours of SRC, to go on from.

    `xlscale train CONFIG` then has its weights, moments, counts and position. SRC: the files of the ranks (ZeRO 1 to 3,
    with tensor parallelism or without) or the universal layout, with our names or those of transformers. It is read
    memory-mapped, a few blocks at a time.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.checkpoint.from_engine import import_engine

    print(import_engine(source, config, out, overrides or [], dp, tp, slot, unsafe_pickle))


@deepspeed.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder, as runs/demo/checkpoints/step-00000300.")],
    out: Annotated[Path, typer.Option(help="Folder that load_checkpoint is to be given.")],
    tp: Annotated[
        int, typer.Option(help="Tensor-parallel size of the run that will load it; 0 = CHECKPOINT's.", min=0)
    ] = 0,
) -> None:
    """Write CHECKPOINT in DeepSpeed's universal layout.

    For an engine with "checkpoint": {"load_universal": true} in its config. A tensor at a time is in memory.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.checkpoint.to_universal import export_universal

    print(export_universal(checkpoint, out, tp))
