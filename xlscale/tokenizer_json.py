"""A SentencePiece model out of tokenizer.json: transformers 5 saves no other file, which 4.56 then does not load."""

import base64
import json
from pathlib import Path
from typing import Any

from xlscale.tokenizer_hub import FIRST_TOKENS, MASK_TOKEN

PIPELINE_FILE = "tokenizer.json"


def read_pipeline(folder: Path, kind: str, else_needed: str) -> dict[str, Any]:
    """Content of a folder's tokenizer.json; ValueError unless its model is of `kind`, "Unigram" or "BPE"."""
    try:
        content = json.loads((folder / PIPELINE_FILE).read_bytes())
        found = content["model"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{PIPELINE_FILE} is no tokenizer ({error!r}); copy it anew") from None
    if found != kind:
        raise ValueError(f"{PIPELINE_FILE} holds a {found} model, not {kind}; another kind needs {else_needed}")
    return dict(content)


def sentencepiece_model(folder: Path) -> bytes:
    """The model that gives the ids of a folder's tokenizer.json; ValueError if that is not laid out as XLM-R's."""
    # Imported here: it needs protobuf, encoding does not.
    from sentencepiece import sentencepiece_model_pb2

    content = read_pipeline(folder, "Unigram", "vocab.json and merges.txt")
    vocab, normalizer = content["model"]["vocab"], content.get("normalizer") or {}
    tokens = [token for token, _ in vocab]
    if tokens[: len(FIRST_TOKENS)] != list(FIRST_TOKENS) or tokens[-1] != MASK_TOKEN:
        raise ValueError(f"{PIPELINE_FILE} must begin with {list(FIRST_TOKENS)} and end with {MASK_TOKEN}, as XLM-R's")
    if normalizer.get("type") != "Precompiled":
        raise ValueError(f"{PIPELINE_FILE} normalises by {normalizer.get('type')}, not by a precompiled map as XLM-R")
    proto = sentencepiece_model_pb2.ModelProto()
    piece = proto.SentencePiece
    for token, kind in (("<unk>", piece.UNKNOWN), ("<s>", piece.CONTROL), ("</s>", piece.CONTROL)):
        proto.pieces.add(piece=token, score=0.0, type=kind)
    for token, score in vocab[len(FIRST_TOKENS) : -1]:
        proto.pieces.add(piece=token, score=score, type=piece.NORMAL)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(proto.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    spec = proto.normalizer_spec
    spec.name, spec.precompiled_charsmap = "nmt_nfkc", base64.b64decode(normalizer["precompiled_charsmap"])
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = True
    return bytes(proto.SerializeToString())
