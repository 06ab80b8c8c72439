"""`python -m data_pipelines RECIPE`, `... tokenizer RECIPE` and `... step NAME RECIPE`."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

USAGE = """python -m data_pipelines RECIPE [--executor local|slurm|ray] [--workers N] [--dry-run]
       python -m data_pipelines tokenizer RECIPE [--against FOLDER]
       python -m data_pipelines step NAME RECIPE --input FILE --output FILE [--dropped FILE]
       all: [--set section.key=value ...]"""
DESCRIPTION = """\
From web archives to training shards.

  python -m data_pipelines RECIPE             read the archives of a recipe (WARC, WET, jsonl, parquet,
                                              txt; local or by URL), write cleaned, identified,
                                              deduplicated shards per language; print what was kept and
                                              dropped, and why
  python -m data_pipelines tokenizer RECIPE   train a tokenizer on those shards, languages balanced;
                                              print how well it cuts each of them, beside another
                                              tokenizer with --against FOLDER
  python -m data_pipelines step NAME RECIPE   run one step alone on the documents of a jsonl file: one
                                              object a line, with `text` and what the step needs

RECIPE is a TOML file, as configs/data_demo.toml. What is finished is not run again, and a run that was
killed goes on.
"""
COMMANDS = ("tokenizer", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what a person has to mend, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given.pop(0) if given and given[0] in COMMANDS else "shards"
    args = _parser(command).parse_args(given)
    # Imported here, so that --help and a misspelt key answer at once.
    from data_pipelines.config_load import load_recipe

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        if command == "shards":
            args.overrides += [f"run.{name}={value}" for name in ("executor", "workers") if (value := vars(args)[name])]
        recipe = load_recipe(args.recipe, args.overrides)
        if command == "step":
            from data_pipelines import alone

            console.print(alone.run(args.name, recipe, args.input, args.output, args.dropped), soft_wrap=True)
        if command == "shards":
            from data_pipelines import recipe as recipes
            from data_pipelines import report

            result = recipes.run(recipe, console, args.dry_run)
            if result is None:
                return 0
            report.show(result, console)
            console.print(f"wrote {recipe.output}: shards, heldout, dropped; look at report.html", soft_wrap=True)
        if command == "tokenizer" or (command == "shards" and "tokenizer" in recipe.steps):
            from data_pipelines import tokenizer

            against = args.against if command == "tokenizer" else ""
            tokenizer.show(tokenizer.run(recipe, console, against), console, bool(against))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    """What a command takes."""
    parser = argparse.ArgumentParser(
        "data_pipelines",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command == "step":
        parser.add_argument("name", metavar="NAME", help="its name in `steps`, or file.py:Class")
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, a TOML file")
    parser.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides",
                        help="another value for one setting; may be given several times")  # fmt: skip
    if command == "shards":
        parser.add_argument("--executor", metavar="local|slurm|ray", help="what runs the tasks: --set run.executor=")
        parser.add_argument("--workers", metavar="N", help="tasks at work at once: --set run.workers=")
        parser.add_argument("--dry-run", action="store_true",
                            help="say what would run next, for Slurm its job script; run nothing")  # fmt: skip
    if command == "tokenizer":
        parser.add_argument("--against", metavar="FOLDER", default="",
                            help="another tokenizer, a folder as on the Hub, measured on the same text")  # fmt: skip
    if command == "step":
        parser.add_argument("--input", metavar="FILE", required=True, help="jsonl, jsonl.gz or jsonl.zst")
        parser.add_argument("--output", metavar="FILE", required=True, help="what is kept; the same kinds")
        parser.add_argument("--dropped", metavar="FILE", help="what is dropped, with its reason")
    return parser


if __name__ == "__main__":
    sys.exit(main())
