"""The first weights of a sharded model from a Hub folder: each rank reads the rows of its own partitions, no others."""

import logging
from pathlib import Path

import torch

from xlscale.checkpoint.hub_config import TOKENIZER_FILES, TOKENIZERS
from xlscale.checkpoint.hub_folder import HubFolder, open_hub_folder
from xlscale.checkpoint.hub_names import VOCABULARY, Shapes, compare_shapes, shapes_of
from xlscale.config_sections import Config
from xlscale.config_values import toml_value
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import Rows
from xlscale.tokenizer_bpe import load_tokenizer

log = logging.getLogger(__name__)

# May differ from the folder's: they change neither names nor shapes nor what the weights mean. Of adapters the names
# say whose they are; of the vocabulary the rows that the config has beyond the folder's are drawn from the seed.
FREE = {
    "vocab_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "use_cache",
    "languages",
    "default_language",
    "num_labels",
    "id2label",
    "problem_type",
}


def folder_rows(config: Config, problems: list[str], head: str = "ForMaskedLM") -> Rows:
    """Where ShardedModel.load() reads the weights of the folder training.init_from.

    ValueError, before anything is read, for a folder that cannot be read or is of another model or tokenizer than the
    config. A value that is not finite is found while reading, where one rank must not leave the others: it goes to
    `problems`, and zeros are given.
    """
    folder = Path(config.training.init_from)
    labels = {name: vars(config.model)[name] for name in ("num_labels", "id2label", "problem_type")}
    opened = open_hub_folder(folder, head, config.training.seed, **labels)
    if not opened.is_mapped:
        raise ValueError(
            f"training.init_from = {toml_value(str(folder))} is a pickle of torch below 1.6, which every process would "
            f"read as a whole; run xlscale import {folder} --out DIR and name DIR"
        )
    shapes = shapes_of(config.model, head)
    _check_model(config, opened, shapes)
    _check_tokenizer(config, opened)
    if opened.new:
        log.info("%s", opened.news())

    def rows(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        assert kind == "fp32", "a folder has no moments"
        held = min(max(opened.shapes[name][0], start), stop)
        found = torch.zeros(held - start, *shapes[name][1:])
        if start < held:
            try:
                found = opened.rows(name, start, held).float()
            except ValueError as error:
                problems.append(str(error))
        if held == stop:
            return found
        added = initial_rows(name, shapes[name], config.model, config.training.seed, held, stop)
        return torch.cat([found, added])

    return rows


def _check_model(config: Config, opened: HubFolder, shapes: Shapes) -> None:
    """ValueError unless [model] is the folder's, but for FREE and for more rows of the vocabulary."""
    ours, theirs = vars(config.model), vars(opened.model)
    different = [
        f"model.{name} = {toml_value(ours[name])} is {toml_value(theirs[name])} there"
        for name in ours
        if name not in FREE and ours[name] != theirs[name]
    ]
    rows, held = config.model.vocab_size, opened.model.vocab_size
    if rows < held:
        different.append(f"model.vocab_size = {rows} would cut its {held} rows")
    if different:
        raise ValueError(
            f"training.init_from = {toml_value(str(opened.where))} is of another model: {'; '.join(different)}; "
            "set [model] to the folder's"
        )
    found = {name: (rows, *shape[1:]) if name in VOCABULARY else shape for name, shape in opened.shapes.items()}
    compare_shapes(found, shapes, f"of training.init_from = {opened.where}")
    if rows > held:
        log.info(
            "%s has %d rows of vocabulary; rows %d to %d are drawn from the seed", opened.where, held, held, rows - 1
        )


def _check_tokenizer(config: Config, opened: HubFolder) -> None:
    """ValueError for another tokenizer than the folder's, whose ids would mean other pieces."""
    folder = opened.where if opened.where.is_dir() else opened.where.parent
    vocabulary = TOKENIZER_FILES[TOKENIZERS[opened.model.model_type]][0]
    if not (folder / vocabulary).is_file():
        log.info("%s has no tokenizer: that data.tokenizer has the model's ids cannot be checked", folder)
    elif load_tokenizer(folder).digest != load_tokenizer(config.data.tokenizer).digest:
        raise ValueError(
            f"data.tokenizer = {toml_value(config.data.tokenizer)} is not the tokenizer of training.init_from = "
            f"{toml_value(str(folder))}: its ids mean other pieces; set data.tokenizer to that folder"
        )
