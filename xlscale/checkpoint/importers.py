"""Somebody's weights -> a Hub folder of ours, tensor by tensor: a model larger than memory converts."""

import logging
import tempfile
from pathlib import Path

from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.hub_config import TOKENIZER_FILES, TOKENIZERS
from xlscale.checkpoint.hub_folder import HubFolder, open_hub_folder
from xlscale.checkpoint.tensor_file import DTYPES
from xlscale.tokenizer_bpe import load_tokenizer
from xlscale.tokenizer_hub import HubTokenizer

log = logging.getLogger(__name__)

FAIRSEQ_DICTIONARY = "dict.txt"
MADE_UP = "madeupword"
"""fairseq fills its dictionary with these up to a round number."""


def import_folder(source: str | Path, out: str | Path, dtype: str = "", unsafe: bool = False) -> Path:
    """Write the Hub folder `out` from a folder, or a weights file in it, of transformers or fairseq.

    dtype: a key of DTYPES, "" = the source's own. unsafe: pickles that ask for more than tensors are read too, and run
    whatever code they hold. Peak memory is the largest tensor, but for pickles of torch below 1.6, which are read as a
    whole. ValueError, with nothing written, for a source that cannot be read or honoured.
    """
    source = Path(source)
    opened = open_hub_folder(source, unsafe=unsafe)
    if not opened.is_mapped:
        log.warning("%s is a pickle of torch below 1.6 and is read into memory as a whole", source)
    folder = source.parent if source.is_file() else source
    with tempfile.TemporaryDirectory() as files:
        written = write_hub_folder(
            out,
            opened.model,
            opened.shapes,
            opened.read,
            tokenizer_folder=tokenizer_folder(folder, opened, Path(files)),
            dtype=dtype or next(name for name, (kept, _, _) in DTYPES.items() if kept == opened.dtype),
            head=opened.head,
        )
    log.info("imported %s, %d tensors of %s, to %s", source, len(opened.shapes), opened.head, written)
    return written


def tokenizer_folder(folder: Path, opened: HubFolder, made: Path) -> Path | None:
    """The folder of the tokenizer: the source's own if it is whole, else made anew in `made` from its vocabulary."""
    wanted = TOKENIZER_FILES[TOKENIZERS[opened.model.model_type]]
    vocabulary = [name for name in wanted if name in ("sentencepiece.bpe.model", "vocab.json", "merges.txt")]
    if not all((folder / name).is_file() for name in vocabulary):
        log.warning("%s has no %s; the tokenizer is left out", folder, " and ".join(vocabulary))
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > opened.model.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, vocab_size is {opened.model.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    _check_dictionary(folder / FAIRSEQ_DICTIONARY, tokenizer)
    if all((folder / name).is_file() for name in wanted):
        return folder
    tokenizer.save(made)
    return made


def _check_dictionary(path: Path, tokenizer: HubTokenizer) -> None:
    """ValueError when fairseq's dictionary numbers the pieces otherwise than the Hub's ids do."""
    if not path.is_file() or not (path.parent / "sentencepiece.bpe.model").is_file():  # RoBERTa's has other words
        return
    first = 4  # <s>, <pad>, </s>, <unk>
    words = [line.rpartition(" ")[0] for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    words = [word for word in words if not word.startswith(MADE_UP)]
    for token_id, word in enumerate(words[: tokenizer.vocab_size - 1 - first], start=first):
        if tokenizer.token(token_id) != word:
            raise ValueError(
                f"{path}: id {token_id} is {word!r} there and {tokenizer.token(token_id)!r} in the tokenizer; "
                "use the tokenizer that the model was trained with"
            )
