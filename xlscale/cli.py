"""The command `xlscale`: arguments in, one clear line out where a person can mend what is wrong."""

import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from xlscale import __version__
from xlscale.cli_data import data
from xlscale.cli_deepspeed import deepspeed
from xlscale.cli_extend import extend
from xlscale.config import ConfigError, load_config

# What is imported inside a command takes seconds (torch); --help and a misspelt key must not wait for it.

app = typer.Typer(
    name="xlscale",
    help="From web archives to a multilingual encoder on the Hub.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data)
app.add_typer(deepspeed)
app.command()(extend)
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated."),
]
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"xlscale {__version__}")
        raise typer.Exit


@app.callback()
def _xlscale(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    local_rank: LocalRank = None,
) -> None:
    _check_local_rank(local_rank)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file, as configs/demo.toml.")],
    overrides: Overrides = None,
    local_rank: LocalRank = None,
) -> None:
    """Pretrain by CONFIG, going on from the newest checkpoint of its run folder if there is one.

    One process without a launcher; under `deepspeed --module xlscale.cli train CONFIG` one per GPU.
    """
    _check_local_rank(local_rank)
    loaded = load_config(config, overrides or [])
    from xlscale.training.loop import train

    train(loaded)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A skipped update, as runs/demo/faults/update-00000012.safetensors.")],
    overrides: Overrides = None,
    local_rank: LocalRank = None,
) -> None:
    """Forward and backward over FILE, the batches of a skipped update: which losses and gradients are not finite.

    With the config and a checkpoint of its run, of which nothing is changed. Processes are started as for train.
    """
    _check_local_rank(local_rank)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from xlscale.training.replay import replay

    lines = replay(file, overrides or [])
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder, as runs/demo/checkpoints/step-00000300.")],
    out: Annotated[Path, typer.Option(help="Folder to write: safetensors, config.json and the tokenizer.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Number format of the weights.")] = "fp32",
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Of xmod: each language's adapters in a file of their own too.")
    ] = False,
    push_to: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="Upload it too; the token is the environment's HF_TOKEN.")
    ] = "",
    public: Annotated[bool, typer.Option("--public", help="A repository made by --push-to is not private.")] = False,
) -> None:
    """Make a Hub folder of CHECKPOINT, a few rows at a time, that transformers loads."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.checkpoint.consolidate import export_checkpoint

    export_checkpoint(checkpoint, out, dtype, adapters)
    print(out)
    if push_to:
        from xlscale.checkpoint.push import upload

        print(upload(out, push_to, private=not public, message=f"Weights of {checkpoint.name}"))


@app.command()
def reshard(
    checkpoint: Annotated[Path, typer.Argument(help="Folder, as runs/demo/checkpoints/step-00000300.")],
    dp: Annotated[int, typer.Option(help="Data-parallel size of the run to come.")],
    tp: Annotated[int, typer.Option(help="Tensor-parallel size of the run to come.")],
    out: Annotated[Path, typer.Option(help="Folder of checkpoints to write it into, as runs/other/checkpoints.")],
) -> None:
    """Cut CHECKPOINT anew for another shape, block by block; train does it by itself when it starts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.checkpoint.reshard import reshard

    print(reshard(checkpoint, out, dp, tp))


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of transformers or fairseq, or a weights file in it.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: safetensors, config.json and the tokenizer.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Number format of the weights; by default SRC's.")
    ] = None,
    unsafe_pickle: Annotated[
        bool, typer.Option("--unsafe-pickle", help="Read a .bin or .pt that asks for more than tensors: its code runs.")
    ] = False,
) -> None:
    """Make a Hub folder of SRC (safetensors, .bin, fairseq's model.pt), tensor by tensor, whatever its size."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.checkpoint.importers import import_folder

    import_folder(source, out, dtype or "", unsafe_pickle)
    print(out)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder, as runs/demo.")]) -> None:
    """Write RUN/report.html, one page without network: losses, languages, throughput, corpus, predictions."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from xlscale.report import write_report

    print(write_report(run))


def main() -> None:
    """Runs the command line; what a person can mend is one line per problem on stderr and exit status 2."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        if not _is_for_people(error):
            raise
        _refuse(error)


def _check_local_rank(local_rank: int | None) -> None:
    """The deepspeed launcher gives the local rank by flag and in the environment; the latter is read."""
    told = os.environ.get("LOCAL_RANK")
    if local_rank is not None and told != str(local_rank):
        raise ValueError(
            f"--local_rank={local_rank} must equal the environment's LOCAL_RANK={told}; "
            "leave it to the deepspeed launcher, which sets both"
        )


def _is_for_people(error: Exception) -> bool:
    """Whether our own code raised it: a ValueError out of torch or another library is a bug to be traced."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [name.partition(".")[0] for name in frames]
    while ours and ours[-1] in sys.stdlib_module_names and ours[-1] != "__main__":
        ours.pop()  # open() and pathlib raise for us
    return bool(ours) and ours[-1] in ("xlscale", "__main__")


def _refuse(error: Exception) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    lines = str(error).splitlines()
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        lines = [f"{error.filename} does not exist; check the path"]
    if rank != "0" and isinstance(error, ConfigError):
        # All processes read the same config: rank 0 says what is wrong with it, and must come to that before
        # the launcher sees an exit and kills the rest.
        time.sleep(5.0)
        lines = []
    for line in lines:
        print(f"xlscale: {line}" if rank == "0" else f"xlscale: [rank {rank}] {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
