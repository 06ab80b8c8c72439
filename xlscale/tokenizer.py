"""SentencePiece tokenizers with the Hub's ids: train, read, and write the four files that transformers loads.

The ids are those of XLM-R: <s> 0, <pad> 1, </s> 2, <unk> 3, then piece i of the SentencePiece model (which
begins <unk> <s> </s>) is id i + 1, and <mask> is the last one.
"""

import base64
import hashlib
import io
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from xlscale.data.order import mix, permute
from xlscale.data.sampling import TEXT_ORDER, language_probabilities
from xlscale.data.shards import Corpus
from xlscale.languages import language_id
from xlscale.tokenizer_hub import FIRST_TOKENS, MASK_TOKEN, SPECIAL_TOKENS, HubTokenizer
from xlscale.tokenizer_json import PIPELINE_FILE, sentencepiece_model

MODEL_FILE = "sentencepiece.bpe.model"  # the Hub's name for XLM-R's model; it is Unigram all the same
BOS, PAD, EOS, UNK, FIRST_PIECE = range(5)
_SPECIAL_IDS = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK}
# What the model numbers <unk> 0 <s> 1 </s> 2; the other pieces are shifted by this.
_SHIFT = 1
# White space to transformers, but a character of its own to SentencePiece's normalisation.
_NEXT_LINE = "\x85"
# Longest line handed to the trainer, in bytes; the trainer would leave out a longer one without a word.
_LINE_BYTES = 4096
# Part of the result (each thread sums its share), so not the machine's number of cores.
_TRAINER_THREADS = 8
# The library's: its first pieces, its limit on nbest_size, and by how much <unk> is less likely than any piece.
_MODELS_OWN = 3
_MOST_CUTS = 512
_UNKNOWN_PENALTY = 10.0


class SentencePieceTokenizer(HubTokenizer):
    """A Unigram SentencePiece model seen through the Hub's ids; ValueError for one that has no such ids."""

    hub_class = "XLMRobertaTokenizer"
    bos_id, pad_id, eos_id, unk_id = BOS, PAD, EOS, UNK

    def __init__(self, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({error}); copy {MODEL_FILE} anew") from None
        processor = self._processor
        ids = (processor.unk_id(), processor.bos_id(), processor.eos_id())
        if ids != (0, 1, 2):
            raise ValueError(f"the SentencePiece model numbers <unk>, <s>, </s> {ids}; the Hub's ids need (0, 1, 2)")
        self._pieces_scored: dict[str, tuple[int, float]] = {}  # filled when it is first needed
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = processor.get_piece_size() + 2
        self.mask_id = self.vocab_size - 1
        self.special_ids = (BOS, PAD, EOS, UNK, self.mask_id)
        self.pieces = range(FIRST_PIECE, self.mask_id)
        for name in SPECIAL_TOKENS:
            if processor.piece_to_id(name) > 2:
                raise ValueError(
                    f"{name!r} is an ordinary piece of the SentencePiece model and a special token of "
                    f"the Hub's; train the model on text without it"
                )

    @classmethod
    def load(cls, folder: str | Path) -> "SentencePieceTokenizer":
        """Read the tokenizer of a folder laid out as on the Hub."""
        path = Path(folder) / MODEL_FILE
        if not path.is_file() and (path.parent / PIPELINE_FILE).is_file():
            path = path.with_name(PIPELINE_FILE)
        if not path.is_file():
            raise ValueError(
                f"{path}: no tokenizer there; train one with python -m data_pipelines CONFIG, or set "
                f"data.tokenizer to a folder that holds {MODEL_FILE}"
            )
        try:
            return cls(path.read_bytes() if path.name == MODEL_FILE else sentencepiece_model(path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _encode(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if not texts:
            return []
        lines = [text.replace(_NEXT_LINE, " ") for text in texts]
        encoded = self._processor.encode(lines, return_type="numpy", num_threads=threads)
        return [_hub_ids(ids) for ids in encoded]

    def _check_sampling(self, nbest_size: int, alpha: float) -> None:
        if nbest_size != -1 and not 2 <= nbest_size <= _MOST_CUTS:
            raise ValueError(f"nbest_size={nbest_size} must be -1, for all cuts, or 2 to {_MOST_CUTS}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha={alpha} must be 0 or more: p(cut) ** alpha, lower is more random; 0.1 is usual")

    def _sample(self, text: str, nbest_size: int, alpha: float, draw: random.Random) -> np.ndarray:
        # The library's own sampling cannot be repeated: another process draws otherwise from the same seed.
        text = text.replace(_NEXT_LINE, " ")
        if nbest_size == -1:
            ids = _cut_at_random(self._processor.normalize(text), self._scores(), alpha, draw)
        else:
            cuts = self._processor.nbest_encode(text, nbest_size=nbest_size, return_type="proto").nbests
            weights = [math.exp(alpha * (cut.score - cuts[0].score)) for cut in cuts]
            ids = [piece.id for cut in draw.choices(cuts, weights) for piece in cut.pieces] if cuts else []
        return _hub_ids(np.array(ids, np.int32))

    def normalised(self, texts: Iterable[str]) -> list[str]:
        """Texts as the model sees them, "▁" for a space."""
        return [self._processor.normalize(text.replace(_NEXT_LINE, " ")) for text in texts]

    def _scores(self) -> dict[str, tuple[int, float]]:
        """Piece -> (the model's id, log probability); under "" what stands for one unknown character."""
        if not self._pieces_scored:
            processor = self._processor
            for i in range(_MODELS_OWN, processor.get_piece_size()):
                if not processor.is_unused(i):
                    self._pieces_scored[processor.id_to_piece(i)] = (i, processor.get_score(i))
            self._pieces_scored[""] = (0, min(score for _, score in self._pieces_scored.values()) - _UNKNOWN_PENALTY)
        return self._pieces_scored

    def token(self, token_id: int) -> str:
        """The piece or special token with an id; ValueError if there is none."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not below vocab_size={self.vocab_size}")
        if token_id < FIRST_PIECE:
            return FIRST_TOKENS[token_id]
        piece: str = self._processor.id_to_piece(token_id - _SHIFT) if token_id != self.mask_id else MASK_TOKEN
        return piece

    def spelled(self) -> list[bytes]:
        """What every id stands for in a text, in UTF-8, with the space before it; b"" for special tokens."""
        pieces = self._processor.id_to_piece(list(range(FIRST_PIECE - _SHIFT, self.mask_id - _SHIFT)))
        return [b""] * FIRST_PIECE + [piece.replace("▁", " ").encode() for piece in pieces] + [b""]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids: <s>, <pad> and </s> are left out, <unk> reads as the model's ` ⁇ `."""
        tokens = [self.token(int(token_id)) for token_id in ids if token_id not in (BOS, PAD, EOS)]
        text: str = self._processor.decode(tokens) if tokens else ""
        return text

    def _vocabulary_files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model}

    def parsed(self) -> Any:
        """The model as sentencepiece's ModelProto; ValueError unless it is Unigram without byte fallback."""
        # Imported here: it needs protobuf, encoding does not.
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model)
        if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM or proto.trainer_spec.byte_fallback:
            raise ValueError(
                "the SentencePiece model must be Unigram without byte fallback, as the Hub's XLM-R files are"
            )
        return proto

    def _pipeline(self) -> dict[str, Any]:
        """tokenizer.json as the Hub has XLM-R's."""
        proto = self.parsed()
        charsmap = proto.normalizer_spec.precompiled_charsmap
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        single = [_special("<s>"), _sequence("A"), _special("</s>")]
        return {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii"),
            },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": [*single, _special("</s>"), _sequence("B"), _special("</s>")],
                "special_tokens": {
                    token: {"id": token, "ids": [_SPECIAL_IDS[token]], "tokens": [token]} for token in ("<s>", "</s>")
                },
            },
            "decoder": metaspace,
            "model": {
                "type": "Unigram",
                "unk_id": UNK,
                "vocab": [[token, 0.0] for token in FIRST_TOKENS]
                + [[piece.piece, piece.score] for piece in proto.pieces[FIRST_PIECE - _SHIFT :]]
                + [[MASK_TOKEN, 0.0]],
                "byte_fallback": False,
            },
        }


def _hub_ids(ids: np.ndarray) -> np.ndarray:
    """The model's ids (int) as the Hub's (int32)."""
    # Only <unk> (0) does not follow the shift: characters never become <s> or </s>.
    return np.where(ids == 0, UNK, ids + _SHIFT).astype(np.int32)


def _cut_at_random(text: str, scores: dict[str, tuple[int, float]], alpha: float, draw: random.Random) -> list[int]:
    """The model's ids of a cut of normalised text, drawn with p(cut) ** alpha among all cuts into its pieces.

    Forward filtering, backward sampling (Kudo 2018, section 3.2). Neighbouring unknown characters are one <unk>.
    """
    longest = max(map(len, scores))
    # Of every position the log of the summed p ** alpha of the cuts up to there, and the last pieces of those.
    total = [0.0]
    ending: list[list[tuple[int, int, float]]] = [[]]  # (where it begins, id, the same log for cuts that end in it)
    for end in range(1, len(text) + 1):
        found = []
        for begin in range(max(0, end - longest), end):
            known = scores.get(text[begin:end])
            if known is None and begin == end - 1:
                known = scores[""]
            if known is not None:
                found.append((begin, known[0], total[begin] + alpha * known[1]))
        most = max(weight for _, _, weight in found)
        total.append(most + math.log(sum(math.exp(weight - most) for _, _, weight in found)))
        ending.append(found)
    ids: list[int] = []
    end = len(text)
    while end:
        weights = [math.exp(weight - total[end]) for _, _, weight in ending[end]]
        end, piece, _ = draw.choices(ending[end], weights)[0]
        if piece or not ids or ids[-1]:
            ids.append(piece)
    return ids[::-1]


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def train_sentencepiece(
    lines: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    character_coverage: float = 0.9995,
    log: Callable[[str], None] = lambda message: None,
    exact: bool = True,
) -> SentencePieceTokenizer:
    """Train a Unigram tokenizer of `vocab_size` Hub ids, <mask> too, and save it; same lines, same model.

    Texts are cut at their line ends and then, at a space where there is one, to what the trainer takes. Takes
    about 19 bytes of memory per byte of text. ValueError tells the sizes that are possible for the text; with
    exact=False a text that yields fewer pieces gives as many as it has.
    """
    smallest = FIRST_PIECE + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}: the special tokens and a piece")
    counted = _Counted(lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - 2,  # <pad> and <mask> are the Hub's own
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc",
            byte_fallback=False,
            hard_vocab_limit=exact,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=_LINE_BYTES,
            shuffle_input_sentence=False,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), vocab_size, character_coverage, counted)) from None
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(folder)
    log(f"{folder}: {vocab_size} ids from {counted.lines:,} lines, {counted.characters:,} characters")
    return tokenizer


def sampled_texts(corpus: Corpus, alpha: float, characters: int, seed: int) -> Iterator[str]:
    """About `characters` of text for the training of a tokenizer, p(language) ~ its characters ** alpha.

    Each language gives its share in whole documents, chunk by chunk in random order, and again if it is
    too small: as the model will see it.
    """
    available = [sum(record.characters for record in corpus.records(code)) for code in corpus.languages]
    for code, share in zip(corpus.languages, language_probabilities(available, alpha), strict=True):
        wanted, chunks, position = share * characters, corpus.chunks(code), 0
        while wanted > 0:
            turn, number = divmod(position, chunks)
            chunk = permute(number, chunks, mix(seed, TEXT_ORDER, language_id(code), turn))
            for document in corpus.read_chunk(code, int(chunk[0])):
                if wanted <= 0:
                    break
                wanted -= len(document["text"])
                yield document["text"]
            position += 1


class _Counted:
    """Lines as the trainer takes them, counted as they pass."""

    def __init__(self, lines: Iterable[str]):
        self._source = lines
        self.lines = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._source:
            for line in text.replace(_NEXT_LINE, "\n").split("\n"):
                for part in _parts(line.strip(), _LINE_BYTES):
                    self.lines += 1
                    self.characters += len(part)
                    yield part


def _parts(line: str, limit: int) -> Iterator[str]:
    """A line in parts of at most `limit` bytes of UTF-8, cut at spaces where there are any."""
    while len(line.encode("utf-8")) > limit:
        # errors="ignore" leaves out the character that the limit cuts in two
        head = line.encode("utf-8")[:limit].decode("utf-8", errors="ignore")
        cut = head.rfind(" ") + 1 or len(head)
        yield line[:cut].rstrip()
        line = line[cut:].lstrip()
    if line:
        yield line


def _training_error(message: str, vocab_size: int, character_coverage: float, counted: _Counted) -> str:
    """What the trainer's complaint means in Hub ids, and the way out."""
    if not counted.lines:
        return "no text to train a tokenizer on: every line is empty; check the shards that were given"
    text = f"a text of {counted.characters:,} characters"
    if found := re.search(r"too high .* value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is more pieces than {text} yields: the largest possible is "
            f"{int(found[1]) + 2}; lower vocab_size or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} does not hold the characters of {text}: the smallest possible is "
            f"{int(found[1]) + 2}; raise vocab_size or lower character_coverage={character_coverage}"
        )
    return f"SentencePiece could not train vocab_size={vocab_size} on {text}: {message}"
