"""The published shapes: the formula, the table of the papers and the real modules agree to the digit."""

import pytest
import torch

from xlscale.models.families import PRESETS, parameter_count, parameter_shapes, preset
from xlscale.models.heads import MaskedLM

PUBLISHED = {
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "xlm-roberta-base": 278_295_186,
    "xlm-roberta-large": 560_142_482,
    "xlm-roberta-xl": 3_482_741_760,
    "xlm-roberta-xxl": 10_712_994_816,
    "xmod-base": 852_723_858,
    "xmod-large-prenorm": 1_581_897_874,
    "xmod-xl": 22_604_426_240,  # ours, not published
}


def test_every_preset_has_a_published_count():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_of_the_real_modules_is_the_published_one(name):
    with torch.device("meta"):
        model = MaskedLM(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert parameter_count(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_order_follow_from_the_config(name):
    with torch.device("meta"):
        model = MaskedLM(preset(name))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(built.items()) == list(parameter_shapes(preset(name)).items())


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'xlm-r-huge'.*use one of.*xlm-roberta-xxl"):
        preset("xlm-r-huge")


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type='bert'.*use one of.*roberta"):
        parameter_shapes(preset("roberta-base", model_type="bert"))
