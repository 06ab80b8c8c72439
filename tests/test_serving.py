"""Serving: a trunk with some languages only, adapters put in and taken out at run time, equal to the whole model."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch

import xlscale
from tests.hub_folders import FAMILIES, IDS, assert_same, noisy
from xlscale.checkpoint.importers import import_folder
from xlscale.checkpoint.weights import Weights
from xlscale.extend import Changes, plan
from xlscale.models.heads import MaskedLM

LANGUAGES = ["en_XX", "de_DE", "fr_XX", "hi_IN"]
BOTH = ["xmod", "xmod-prenorm"]


def config_of(family="xmod"):
    return dataclasses.replace(FAMILIES[family], languages=LANGUAGES, default_language="de_DE")


def saved(path, family="xmod", **options):
    return xlscale.save_pretrained(noisy(config_of(family)), path, adapters=True, **options)


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "hub")


def logits(model, *languages):
    """Of a batch with a sample in each language."""
    with torch.no_grad():
        return model(IDS.repeat(len(languages), 1), lang_ids=model.lang_ids(languages)).logits


@pytest.mark.parametrize("family", BOTH)
def test_a_model_of_some_languages_gives_the_logits_of_the_whole_to_the_bit(family, tmp_path):
    folder = saved(tmp_path / "hub", family)
    whole, served = xlscale.load_pretrained(folder), xlscale.load_pretrained(folder, languages=["fr_XX", "en_XX"])
    assert served.config.languages == ["fr_XX", "en_XX"] and served.config.default_language == ""
    assert torch.equal(logits(served, "en_XX", "fr_XX"), logits(whole, "en_XX", "fr_XX"))
    assert torch.equal(served.lang_ids(["en_XX", "fr_XX"]), torch.tensor([1, 0]))
    assert xlscale.load_pretrained(folder, languages=["hi_IN", "de_DE"]).config.default_language == "de_DE"


def test_only_the_languages_asked_for_are_read_and_held(folder, monkeypatch):
    read, rows = set(), Weights.rows
    monkeypatch.setattr(Weights, "rows", lambda self, name, *where: read.add(name) or rows(self, name, *where))
    served = xlscale.load_pretrained(folder, languages=["fr_XX"])
    assert {name.split("adapter_modules.")[1].split(".")[0] for name in read if "adapter_modules" in name} == {"fr_XX"}
    whole = sum(value.numel() for value in noisy(config_of()).parameters())
    per_language = 2 * (2 * 16 * 8 + 16 + 8)
    assert sum(value.numel() for value in served.parameters()) == whole - 3 * per_language


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("source", ["adapters/{}.safetensors", ""])
def test_adapters_come_and_go_at_run_time(source, family, tmp_path):
    folder = saved(tmp_path / "hub", family)
    whole, served = xlscale.load_pretrained(folder), xlscale.load_pretrained(folder, languages=["en_XX"])
    for language in ("hi_IN", "fr_XX", "de_DE"):
        served.add_adapter(folder / source.format(language), language)
        assert torch.equal(logits(served, language, "en_XX"), logits(whole, language, "en_XX"))
    assert served.config.languages == ["en_XX", "hi_IN", "fr_XX", "de_DE"]
    served.remove_adapter("hi_IN")
    assert torch.equal(
        logits(served, *["fr_XX", "en_XX", "de_DE"] * 2), logits(whole, *["fr_XX", "en_XX", "de_DE"] * 2)
    )
    served.add_adapter(folder / source.format("hi_IN"), "hi_IN")
    assert torch.equal(logits(served, *LANGUAGES), logits(whole, *LANGUAGES))
    assert not any(module.training for module in served.modules())
    saved_again = xlscale.save_pretrained(served, tmp_path / "again")
    assert torch.equal(logits(xlscale.load_pretrained(saved_again), *LANGUAGES), logits(whole, *LANGUAGES))


def test_removed_adapters_leave_memory(folder):
    served = xlscale.load_pretrained(folder, languages=["en_XX", "fr_XX"])
    weight = weakref.ref(served.encoder.layers[1].adapters["fr_XX"].down.weight)
    served.remove_adapter("fr_XX")
    gc.collect()
    assert weight() is None and not [name for name, _ in served.named_parameters() if "fr_XX" in name]


def test_languages_that_no_folder_had_are_served(folder, tmp_path):
    new = plan(folder, Changes(add=["sw_KE"], init=["average:en_XX,hi_IN"]))
    whole = xlscale.load_pretrained(new.write(tmp_path / "new"))
    (file,) = new.extract(tmp_path / "files", ["sw_KE"])
    served = xlscale.load_pretrained(folder, languages=["en_XX"])
    served.add_adapter(str(file), "sw_KE")
    assert torch.equal(logits(served, "sw_KE"), logits(whole, "sw_KE"))
    served.set_default_language("sw_KE")
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, logits(whole, "sw_KE"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_number_formats_may_differ_where_the_trunk_is_the_same(dtype, folder, tmp_path):
    """A model in bf16 takes adapters of the fp32 folder, one that went through bf16 takes them in fp32."""
    half = import_folder(folder, tmp_path / "half", "bf16")
    served = xlscale.load_pretrained(half if dtype == torch.float32 else folder, languages=["en_XX"], dtype=dtype)
    served.add_adapter(folder / "adapters/fr_XX.safetensors", "fr_XX")
    added = served.encoder.layers[0].adapters["fr_XX"].down.weight
    assert added.dtype == dtype
    wanted = xlscale.load_pretrained(folder).encoder.layers[0].adapters["fr_XX"].down.weight
    assert torch.equal(added, wanted.to(dtype))


def test_a_trunk_that_has_changed_since_takes_no_adapters_unless_told(folder):
    """As after fine-tuning; what was digested before the change is not believed."""
    served = xlscale.load_pretrained(folder, languages=["en_XX", "de_DE"])
    served.add_adapter(folder, "hi_IN")
    with torch.no_grad():
        served.encoder.layers[0].mlp.up.weight[0, 0] += 1e-3
    file = folder / "adapters/fr_XX.safetensors"
    for source in (folder, file):
        with pytest.raises(ValueError, match=r"the trunk's layers are others"):
            served.add_adapter(source, "fr_XX")
    assert served.config.languages == ["en_XX", "de_DE", "hi_IN"]
    served.add_adapter(file, "fr_XX", other_trunk=True)
    wanted = xlscale.load_pretrained(folder).encoder.layers[0].adapters["fr_XX"]
    for name, value in served.encoder.layers[0].adapters["fr_XX"].named_parameters():
        assert torch.equal(value, wanted.get_parameter(name))


def test_a_head_of_its_own_does_not_matter(folder, caplog):
    served = xlscale.load_pretrained(folder, "ForTokenClassification", languages=["en_XX"], num_labels=3)
    served.add_adapter(folder, "fr_XX")
    whole = xlscale.load_pretrained(folder, "ForTokenClassification", num_labels=3)
    assert torch.equal(logits(served, "fr_XX"), logits(whole, "fr_XX"))


def test_a_folder_that_changes_is_digested_anew(folder, tmp_path):
    served = xlscale.load_pretrained(folder, languages=["en_XX"])
    served.add_adapter(folder, "fr_XX")
    saved_other = noisy(config_of(), seed=1)
    xlscale.save_pretrained(saved_other, folder, adapters=True)
    with pytest.raises(ValueError, match="the trunk's layers are others"):
        served.add_adapter(folder, "hi_IN")


def test_a_copy_of_a_model_takes_adapters_of_its_own(folder):
    served = xlscale.load_pretrained(folder, languages=["en_XX"])
    served.add_adapter(folder, "fr_XX")
    other = copy.deepcopy(served)
    other.add_adapter(folder, "hi_IN")
    assert other.config.languages == ["en_XX", "fr_XX", "hi_IN"]
    assert served.config.languages == ["en_XX", "fr_XX"]


def test_what_cannot_be_served_is_refused_and_changes_nothing(folder, tmp_path):
    plain = xlscale.save_pretrained(noisy(FAMILIES["xl"]), tmp_path / "xl")
    served = xlscale.load_pretrained(folder, languages=["en_XX", "de_DE"])
    before = copy.deepcopy(served)
    file = folder / "adapters/fr_XX.safetensors"
    for act, line in (
        (lambda: xlscale.load_pretrained(folder, languages=["sw_KE"]), "has no adapters of sw_KE"),
        (lambda: xlscale.load_pretrained(folder, languages=["fr_XX", "fr_XX"]), "names fr_XX more than once"),
        (lambda: xlscale.load_pretrained(folder, languages=[]), "gives no adapter; name the languages"),
        (lambda: xlscale.load_pretrained(plain, languages=["fr_XX"]), "type xlm-roberta-xl, which has no languages"),
        (lambda: served.add_adapter(file, "hi_IN"), "has no adapters of hi_IN"),
        (lambda: served.add_adapter(folder, "sw_KE"), "has no adapters of sw_KE"),
        (lambda: served.add_adapter(folder, "de_DE"), r"de_DE has adapters already; remove_adapter\('de_DE'\)"),
        (lambda: served.add_adapter(plain, "fr_XX"), "it is no xmod model"),
        (lambda: served.add_adapter(tmp_path / "nowhere", "fr_XX"), "nowhere is not a folder"),
        (lambda: xlscale.load_pretrained(plain).add_adapter(file, "fr_XX"), "of type xlm-roberta-xl has no adapters"),
        (lambda: MaskedLM(config_of()).add_adapter(file, "sw_KE"), "load it by xlscale.load_pretrained"),
        (lambda: served.remove_adapter("fr_XX"), "no adapter for 'fr_XX'; the languages are en_XX, de_DE"),
        (lambda: served.remove_adapter("de_DE"), r"de_DE is the default language; set_default_language\(\)"),
        (lambda: served.lang_ids(["de_DE", "fr_XX"]), "no adapter for 'fr_XX'; the languages are en_XX, de_DE"),
        (lambda: xlscale.load_pretrained(folder, languages=["fr_XX"]).remove_adapter("fr_XX"), "the only language"),
    ):
        with pytest.raises(ValueError, match=line):
            act()
    assert_same(served, before)
