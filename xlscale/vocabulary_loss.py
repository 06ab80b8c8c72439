"""The masked-LM loss of a model that need not fit into memory: one layer of it is there at a time.

B parts of documents, T tokens, M predicted tokens, D hidden
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from xlscale.checkpoint.tensor_file import Pieces
from xlscale.config_sections import MaskingConfig, ModelConfig
from xlscale.data.masking import IGNORE, mask_rules, mask_tokens
from xlscale.models.heads import MaskedLM
from xlscale.tokenizer_hub import HubTokenizer

PARTS, TOKENS = 64, 128
"""Parts of documents at most, and tokens of each, <s> and </s> too."""
_HEAD_ROWS = 256  # predicted tokens whose scores over the vocabulary are in memory at a time


class HeldOut:
    """Parts of documents with fixed masks: 15 % of the tokens, a function of the documents and the tokenizer."""

    def __init__(self, texts: Sequence[str], tokenizer: HubTokenizer, model: ModelConfig):
        longest = min(TOKENS, model.max_position_embeddings - model.pad_token_id - 1) - 2
        cut = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
        # The beginnings of all, then what follows in each.
        starts = range(0, max(map(len, cut), default=0), longest)
        rows = [ids[start : start + longest] for start in starts for ids in cut if start < len(ids)][:PARTS]
        ids_BT = np.full((len(rows), max(map(len, rows), default=0) + 2), tokenizer.pad_id, np.int64)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids) + 2] = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        masking = MaskingConfig()
        chances_B = np.full(len(rows), masking.mlm_probability)
        masked = mask_tokens(ids_BT, np.arange(len(rows)), chances_B, 0, mask_rules(masking, tokenizer))
        self.input_ids_BT, self.labels_BT = map(torch.from_numpy, masked)
        self.attention_BT = torch.from_numpy(ids_BT != tokenizer.pad_id)
        self.predicted = int((masked[1] != IGNORE).sum())
        self.parts = len(rows)

    def loss(self, model: ModelConfig, pieces: Pieces, language: str = "") -> float:
        """Mean cross-entropy in nats of the predicted tokens, fp32 on the CPU; nan where none is predicted.

        pieces: the rows of a parameter by our name. language: whose adapters are used, of those in model.languages.
        Memory: the embeddings and a layer.
        """
        if not self.predicted:
            return math.nan
        with torch.device("meta"):
            built = MaskedLM(model).eval()
        named = {id(parameter): name for name, parameter in built.named_parameters()}  # the tied one once
        for layer in built.encoder.layers:
            _come_and_go(layer, named, pieces, language)
        inside = {id(module) for layer in built.encoder.layers for module in layer.modules()}
        there: dict[str, nn.Parameter] = {}
        for module in built.modules():
            if id(module) not in inside:
                _fill(module, named, pieces, there)
        lang_ids = None
        if model.languages:
            lang_ids = torch.full((self.parts,), model.languages.index(language))
        with torch.no_grad():
            hidden_BTD = built.encoder(self.input_ids_BT, self.attention_BT, lang_ids=lang_ids).last_hidden_state
            chosen_BT = self.labels_BT != IGNORE
            losses = [
                built.head.decoder.token_losses(built.head(hidden_MD), labels_M)[0]
                for hidden_MD, labels_M in zip(
                    hidden_BTD[chosen_BT].split(_HEAD_ROWS), self.labels_BT[chosen_BT].split(_HEAD_ROWS), strict=True
                )
            ]
        return float(torch.cat(losses).double().mean())


def _whole(pieces: Pieces, name: str, meta: Tensor) -> nn.Parameter:
    """A parameter of the shape of `meta`, fp32."""
    value, at = torch.empty(meta.shape, device="cpu"), 0
    for rows in pieces(name):
        value[at : at + len(rows)] = rows
        at += len(rows)
    return nn.Parameter(value, requires_grad=False)


def _fill(module: nn.Module, named: dict[int, str], pieces: Pieces, there: dict[str, nn.Parameter]) -> None:
    """Give a module's own parameters their values, the tied one that of the first place."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        name = named[id(parameter)]
        if name not in there:
            there[name] = _whole(pieces, name, parameter)
        setattr(module, leaf, there[name])


def _come_and_go(layer: nn.Module, named: dict[int, str], pieces: Pieces, language: str) -> None:
    """Have a layer read its parameters before each forward, other languages' adapters aside, and drop them after it."""
    places = [
        (module, leaf, parameter)
        for module in layer.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if ".adapters." not in named[id(parameter)] or f".adapters.{language}." in named[id(parameter)]
    ]

    def come(*_: object) -> None:
        for module, leaf, parameter in places:
            setattr(module, leaf, _whole(pieces, named[id(parameter)], parameter))

    def go(*_: object) -> None:
        for module, leaf, parameter in places:
            setattr(module, leaf, parameter)

    layer.register_forward_pre_hook(come)
    layer.register_forward_hook(go)
