"""`xlscale extend`: a trained model's folder in, one with other languages out."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer


def extend(
    folder: Annotated[Path, typer.Argument(help="Hub folder of a trained model, ours or from elsewhere.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; may be left out where --extract is all.")] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="OTHER", help="Take in the languages of a folder or an adapter file; may be repeated."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Another code for a language; may be repeated.")
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="LANG", help="A new language, as sw_KE; may be repeated.")
    ] = None,
    init: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INIT",
            help="What new languages start from: copy:xx_YY, average:aa_BB,cc_DD or random[:SEED]; LANG=INIT for one.",
        ),
    ] = None,
    prune: Annotated[
        list[str] | None, typer.Option(metavar="LANG,LANG", help="Languages to drop; those after them get lower ids.")
    ] = None,
    default: Annotated[
        str, typer.Option(metavar="LANG", help="Language of samples that come without a language id.")
    ] = "",
    extract: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write adapter files, DIR/xx_YY.safetensors, of the result.")
    ] = None,
    extract_only: Annotated[
        str, typer.Option(metavar="LANG,LANG", help="Of --extract: these languages, instead of all.")
    ] = "",
    adapters: Annotated[
        bool | None,
        typer.Option(
            "--adapters/--no-adapters",
            help="Adapter files in the new folder too; by default as in FOLDER.",
            show_default=False,
        ),
    ] = None,
    # of the vocabulary
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="NEW", help="Folder of the tokenizer to have from now on.")
    ] = None,
    add_pieces: Annotated[
        Path | None,
        typer.Option(
            metavar="CORPUS",
            help="Learn new pieces on shards, or on a text file with a document a line. With --tokenizer: text that "
            "says what its pieces are like.",
        ),
    ] = None,
    pieces: Annotated[
        int, typer.Option(help="New pieces at most; 5000 is usual for a language.", show_default=False)
    ] = 0,
    language: Annotated[
        str, typer.Option(metavar="LANG", help="The language of --add-pieces, where CORPUS has several.")
    ] = "",
    old_shards: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Shards of old languages to compare; by default the others of CORPUS."),
    ] = None,
    old_characters: Annotated[
        int, typer.Option(metavar="N", help="Read of each old language, for --protect and to measure what changes.")
    ] = 500_000,
    protect: Annotated[
        bool, typer.Option("--protect", help="Leave out pieces that change the cut of the old text that is read.")
    ] = False,
    rows: Annotated[
        Literal["mixture", "mean", "random"],
        typer.Option(help="Rows of new pieces: of pieces like them, of those of their old cut, or drawn from --seed."),
    ] = "mixture",
    seed: Annotated[int, typer.Option(help="Of random rows, and of which part of a large corpus is read.")] = 0,
    loss: Annotated[
        bool, typer.Option("--loss/--no-loss", help="Measure the loss at step 0, which takes two forwards on the CPU.")
    ] = True,
) -> None:
    """Change languages and vocabulary of FOLDER without training: merge, rename, add, prune, pieces, in this order.

    Whatever is not asked to change has the same bits afterwards. Any size: a few rows are in memory at a time. Of new
    pieces it is told how much old text is cut otherwise, and the loss at step 0 on text of the new language.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from xlscale.extend import Changes, listed, plan
    from xlscale.extend_vocabulary import VocabularyChanges, extend_vocabulary

    changes = Changes(
        merge=merge or (),
        rename=rename or (),
        add=[code for text in add or () for code in listed(text)],
        init=init or (),
        prune=[code for text in prune or () for code in listed(text)],
        default=default,
    )
    vocabulary = VocabularyChanges(
        tokenizer=tokenizer,
        corpus=add_pieces,
        pieces=pieces,
        language=language,
        old_shards=old_shards,
        old_characters=old_characters,
        protect=protect,
        rows=rows,
        seed=seed,
        loss=loss,
    )
    _check(folder, out, changes.some, vocabulary.some, adapters, extract, extract_only)
    made = plan(folder, changes) if changes.some or extract is not None or not vocabulary.some else None
    if made is not None:
        if extract is not None:  # before hours of writing
            made.to_extract(extract, listed(extract_only))
        print("\n".join(made.told), end="\n" if made.told else "")
    if vocabulary.some:
        assert out is not None
        print(extend_vocabulary(folder, out, vocabulary, print, made, adapters))
    elif made is not None and out is not None:
        print(made.write(out, adapters))
    if made is not None and extract is not None:
        final = made.as_written(out) if vocabulary.some and out is not None else made
        print("\n".join(map(str, final.extract(extract, listed(extract_only)))))


def _check(
    folder: Path,
    out: Path | None,
    languages: bool,
    vocabulary: bool,
    adapters: bool | None,
    extract: Path | None,
    only: str,
) -> None:
    """ValueError for options that do not go together."""
    if not (languages or vocabulary) and extract is None and adapters is None:
        raise ValueError(
            f"nothing to do with {folder}; use --merge, --rename, --add, --prune, --default, --extract, --adapters, "
            "--add-pieces or --tokenizer"
        )
    if out is None and (vocabulary or extract is None or adapters is not None):
        raise ValueError("--out is missing; name the folder to write")
    if only and extract is None:
        raise ValueError("--extract-only is for --extract DIR; say where the adapter files go")
