"""Token shards: the text shards as blocks of ids for one tokenizer and length, derived once, memory-mapped.

<cache>/tokens-<corpus>-<tokenizer>-<length>-v1/<language>.bin  blocks [N, T], little-endian uint16 or uint32
                                                manifest.json   what they were made from, how many there are
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlscale.data.packing import pack_documents
from xlscale.data.shards import Corpus, fsync_path, write_atomically
from xlscale.tokenizer_hub import HubTokenizer

log = logging.getLogger(__name__)

_VERSION = 1  # of the packing and of these files: raise it when the same text gives other blocks
_MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]
"""Called with the documents done and the documents there are."""


@dataclass(frozen=True)
class LanguageTokens:
    """What a language's token shard holds; `tokens` without <s> and padding."""

    blocks: int
    tokens: int
    documents: int


class TokenShards:
    """The token shards of a corpus; files are mapped when first used and not pickled, so it may be sent."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = f"{folder / _MANIFEST} cannot be read ({error}); remove {folder} to derive it anew"
            raise ValueError(problem) from None
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer: str = manifest["tokenizer"]
        self.sequence_length: int = manifest["sequence_length"]
        self.dtype = np.dtype(manifest["dtype"])
        self.languages = {code: LanguageTokens(**facts) for code, facts in manifest["languages"].items()}
        self._maps: dict[str, np.ndarray] = {}
        for code, facts in self.languages.items():
            path, expected = self._path(code), facts.blocks * self.sequence_length * self.dtype.itemsize
            size = path.stat().st_size if path.exists() else -1
            if size != expected:
                found = f"{size} bytes" if path.exists() else "missing"
                raise ValueError(
                    f"{path}: {found}, {_MANIFEST} says {expected} bytes; remove {folder} to derive it anew"
                )

    def _path(self, language: str) -> Path:
        return self.folder / f"{language}.bin"

    def blocks(self, language: str) -> np.ndarray:
        """All blocks of a language, [N, T], read-only and not in memory."""
        if language not in self._maps:
            shape = (self.languages[language].blocks, self.sequence_length)
            # asarray: rows of a plain array are cheaper to take than rows of a memmap
            self._maps[language] = np.asarray(np.memmap(self._path(language), dtype=self.dtype, mode="r", shape=shape))
        return self._maps[language]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def prepare_tokens(
    corpus: Corpus,
    tokenizer: HubTokenizer,
    sequence_length: int,
    cache: str | Path = "",
    progress: Progress | None = None,
) -> TokenShards:
    """Open the token shards of a corpus, deriving them first if nobody has; many processes may call it.

    One process derives, the others wait for it. An interruption leaves nothing that counts. ValueError for a
    damaged chunk (it names the shard) and for a language without a single token.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2: <s> and a token; 512 is usual")
    parent = Path(cache) if str(cache) else corpus.folder.parent / "tokens"
    folder = parent / f"tokens-{corpus.fingerprint[:12]}-{tokenizer.digest[:12]}-{sequence_length}-v{_VERSION}"
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        with _alone(parent / f".{folder.name}.lock"):
            if not folder.exists():
                _derive(corpus, tokenizer, sequence_length, folder, progress or (lambda done, documents: None))
    return TokenShards(folder)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock; the system lets go of it when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for the process that derives %s", path.name[1:].removesuffix(".lock"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _derive(corpus: Corpus, tokenizer: HubTokenizer, sequence_length: int, folder: Path, progress: Progress) -> None:
    """Tokenise and pack every chunk into a folder beside, and give it its name when it is whole."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of one that was killed: the lock is ours
    beside.mkdir()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    done, documents = 0, sum(corpus.documents(language) for language in corpus.languages)
    facts = {}
    try:
        for language in corpus.languages:
            blocks = tokens = 0
            with (beside / f"{language}.bin").open("wb") as file:
                for number in range(corpus.chunks(language)):
                    chunk = corpus.read_chunk(language, number)
                    ids = tokenizer.encode_batch([d["text"] for d in chunk], threads=os.cpu_count() or 1)
                    packed = pack_documents(ids, sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
                    file.write(packed.astype(dtype).tobytes())
                    blocks, tokens = blocks + len(packed), tokens + sum(len(i) + 1 for i in ids if len(i))
                    done += len(chunk)
                    progress(done, documents)
                file.flush()
                os.fsync(file.fileno())
            if not blocks:
                raise ValueError(f"{language}: its shards hold no token; leave it out of data.languages")
            facts[language] = asdict(LanguageTokens(blocks, tokens, corpus.documents(language)))
        manifest = {
            "fingerprint": corpus.fingerprint,
            "tokenizer": tokenizer.digest,
            "sequence_length": sequence_length,
            "dtype": dtype.str,
            "languages": facts,
        }
        write_atomically(beside / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
        beside.replace(folder)
        fsync_path(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    log.info("derived %s: %d blocks", folder, sum(fact["blocks"] for fact in facts.values()))
