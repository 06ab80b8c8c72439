"""xlscale/extend.py: languages in and out of a folder, and nothing else changed by a bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import xlscale
from tests.hub_folders import FAMILIES, IDS, as_bin, noisy
from xlscale.checkpoint.adapter_file import open_adapters
from xlscale.checkpoint.hub_names import hf_names
from xlscale.extend import Changes, plan
from xlscale.models.init import initial_rows

LANGUAGES = ["en_XX", "de_DE", "fr_XX", "hi_IN"]
CONFIG = dataclasses.replace(FAMILIES["xmod-prenorm"], languages=LANGUAGES, default_language="de_DE")
BELOW = ".output.adapter_modules."


@pytest.fixture
def folder(tmp_path):
    return xlscale.save_pretrained(noisy(CONFIG), tmp_path / "hub")


def weights(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def own(tensors, language):
    """The tensors of one language, by what comes after its code."""
    return {
        name.replace(f"{BELOW}{language}.", " "): value
        for name, value in tensors.items()
        if f"{BELOW}{language}." in name
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def assert_kept(folder, out, languages, renamed=None):
    """The trunk and these languages' adapters have the same bits in both folders."""
    before, after = weights(folder), weights(out)
    shared = [{k: v for k, v in tensors.items() if BELOW not in k} for tensors in (after, before)]
    assert_equal(*shared)
    for language in languages:
        assert own(before, language)
        assert_equal(own(after, (renamed or {}).get(language, language)), own(before, language))
    one, other = json.loads((folder / "config.json").read_text()), json.loads((Path(out) / "config.json").read_text())
    for content in (one, other):
        del content["languages"], content["default_language"]
    assert one == other


def extended(folder, **changes):
    out = folder.parent / "out"
    made = plan(folder, Changes(**changes))
    return made.write(out), made


def ours(folder):
    return xlscale.load_pretrained(folder).config


# What each action makes


def test_new_languages_come_last_and_nothing_else_changes_by_a_bit(folder):
    inits = ["average:en_XX,hi_IN", "zu_ZA=copy:fr_XX", "yo_NG=random:7"]
    out, made = extended(folder, add=["sw_KE", "zu_ZA", "yo_NG"], init=inits)
    assert_kept(folder, out, LANGUAGES)
    assert ours(out).languages == [*LANGUAGES, "sw_KE", "zu_ZA", "yo_NG"] and ours(out).default_language == "de_DE"
    tensors = weights(out)
    english, hindi = own(tensors, "en_XX"), own(tensors, "hi_IN")
    assert_equal(
        own(tensors, "sw_KE"), {name: ((english[name].double() + hindi[name]) / 2).float() for name in english}
    )
    assert_equal(own(tensors, "zu_ZA"), own(tensors, "fr_XX"))
    for name, value in own(tensors, "yo_NG").items():
        assert not value.any() if name.endswith("bias") else 0.01 < value.std() < 0.03
    name = "encoder.layers.1.adapters.yo_NG.down.weight"
    drawn = initial_rows(name, (4, 16), ours(out), 7, 0, 4)
    assert torch.equal(tensors[hf_names(ours(out))[name]], drawn), "by seed and name, as an initial weight is"
    assert made.told == [
        "added sw_KE (id 4): average:en_XX,hi_IN", "added zu_ZA (id 5): copy:fr_XX", "added yo_NG (id 6): random:7"
    ]  # fmt: skip


def test_old_languages_give_the_same_logits_after_all_surgery(folder):
    out, made = extended(folder, rename=["hi_IN=hi_Latn"], add=["sw_KE"], init=["average:en_XX,fr_XX"], prune=["fr_XX"])
    assert_kept(folder, out, ["en_XX", "de_DE", "hi_IN"], {"hi_IN": "hi_Latn"})
    old, new = xlscale.load_pretrained(folder), xlscale.load_pretrained(out)
    assert new.config.languages == ["en_XX", "de_DE", "hi_Latn", "sw_KE"]
    for before, after in (("en_XX", "en_XX"), ("de_DE", "de_DE"), ("hi_IN", "hi_Latn")):
        wanted = old(IDS, lang_ids=old.lang_ids([before])).logits
        assert torch.equal(new(IDS, lang_ids=new.lang_ids([after])).logits, wanted)
    assert "ids that change: hi_Latn 3 -> 2" in made.told and "renamed hi_IN to hi_Latn" in made.told


def test_merged_languages_come_from_folders_and_files_of_the_same_trunk(folder, tmp_path):
    other = plan(folder, Changes(add=["sw_KE", "zu_ZA"], init=["random:1"], prune=["fr_XX"])).write(tmp_path / "b")
    (file,) = plan(other, Changes(rename=["zu_ZA=xh_ZA"])).extract(tmp_path / "files", ["xh_ZA"])
    out, made = extended(folder, merge=[other, file], add=["so_SO"], init=["average:sw_KE,xh_ZA"])
    assert_kept(folder, out, LANGUAGES)
    assert_kept(other, out, ["en_XX", "sw_KE", "zu_ZA"])
    assert_equal(own(weights(out), "xh_ZA"), own(weights(other), "zu_ZA"))
    assert ours(out).languages == [*LANGUAGES, "sw_KE", "zu_ZA", "xh_ZA", "so_SO"]
    assert made.told[0].endswith("sw_KE (id 4), zu_ZA (id 5); the same in both: en_XX, de_DE, hi_IN")


def test_pruned_default_needs_another(folder):
    with pytest.raises(ValueError, match=r"de_DE is the default language and would be pruned.*--default en_XX"):
        plan(folder, Changes(prune=["de_DE"]))
    out, _ = extended(folder, prune=["de_DE"], default="hi_IN")
    assert ours(out).default_language == "hi_IN" and ours(out).languages == ["en_XX", "fr_XX", "hi_IN"]
    renamed = plan(folder, Changes(rename=["de_DE=nds_DE"]))
    assert renamed.model.default_language == "nds_DE"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_as_they_are_and_a_merged_language_is_rounded_and_told(dtype, folder, tmp_path):
    half = xlscale.save_pretrained(noisy(CONFIG).to(dtype), tmp_path / "half")
    single = plan(folder, Changes(add=["sw_KE"], init=["random"])).extract(tmp_path / "files", ["sw_KE"])[0]
    out, made = extended(half, merge=[single], add=["zu_ZA"], init=["average:en_XX,de_DE"])
    assert_kept(half, out, LANGUAGES)
    assert_equal(own(weights(out), "sw_KE"), {
        name.replace("layer.", "roberta.encoder.layer.").replace(".dense", " dense"): value.to(dtype)
        for name, value in load_file(single).items()
    })  # fmt: skip
    (told,) = [line for line in made.told if "sw_KE" in line]
    assert told.endswith(f"rounded to {'bf16' if dtype == torch.bfloat16 else 'fp16'}")


def test_sharded_folders_and_pickles_are_extended_too(tmp_path):
    sharded = xlscale.save_pretrained(noisy(CONFIG), tmp_path / "sharded", max_shard_size="10KB")
    pickle = as_bin(xlscale.save_pretrained(noisy(CONFIG), tmp_path / "pickle"))
    changes = Changes(add=["sw_KE"], init=["average:en_XX,de_DE"])
    one, other = plan(sharded, changes).write(tmp_path / "one"), plan(pickle, changes).write(tmp_path / "other")
    assert_kept(sharded, one, LANGUAGES)
    assert_equal(weights(one), weights(other))


def test_other_heads_and_the_tokenizer_come_along(tiny_tokenizer_folder, tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=500, num_labels=3)
    folder = xlscale.save_pretrained(noisy(config, "ForTokenClassification"), tmp_path / "a", tiny_tokenizer_folder)
    out, _ = extended(folder, add=["sw_KE"], init=["copy:en_XX"])
    assert_kept(folder, out, LANGUAGES)
    assert {path.name for path in out.iterdir()} == {"README.md", *(path.name for path in folder.iterdir())}
    card = (out / "README.md").read_text()
    assert '- "sw"' in card and "- added sw_KE (id 4): copy:en_XX" in card and str(folder.parent) not in card
    assert xlscale.load_pretrained(out).architecture == "ForTokenClassification"


def test_writing_reads_a_few_rows_at_a_time(folder, monkeypatch):
    """No tensor is asked for as a whole: the largest piece is what PIECE says."""
    import xlscale.checkpoint.adapter_file as adapter_file
    import xlscale.checkpoint.trunk as trunk

    for module in (trunk, adapter_file):
        monkeypatch.setattr(module, "PIECE", 32)
    made = plan(folder, Changes(add=["sw_KE"], init=["average:en_XX,de_DE"]))
    read, rows = [], type(made.opened.weights).rows

    def watched(self, name, start, stop):
        read.append(stop - start)
        return rows(self, name, start, stop)

    monkeypatch.setattr(type(made.opened.weights), "rows", watched)
    out = made.write(folder.parent / "out")
    assert max(read) <= 32 and read.count(2) > 60
    monkeypatch.undo()
    assert_kept(folder, out, LANGUAGES)


# What is refused, before anything is written


REFUSED = {
    "added twice": ({"add": ["sw_KE", "sw_KE"], "init": ["random"]}, "--add sw_KE is given twice"),
    "added and there": ({"add": ["de_DE"], "init": ["random"]}, "has de_DE already; leave it out of --add"),
    "added without init": ({"add": ["sw_KE"]}, "--add sw_KE needs --init: copy:xx_YY"),
    "init of one, none for the other": ({"add": ["sw_KE", "zu_ZA"], "init": ["sw_KE=random"]}, "--add zu_ZA needs"),
    "init of what is not added": ({"add": ["sw_KE"], "init": ["zu_ZA=random"]}, "is for zu_ZA, which is not added"),
    "init alone": ({"init": ["random"]}, "is for new languages; say which by --add"),
    "two inits": ({"add": ["sw_KE"], "init": ["random", "copy:en_XX"]}, "--init is given twice for all languages"),
    "unknown init": ({"add": ["sw_KE"], "init": ["zeros"]}, "--init zeros for sw_KE is none of copy:xx_YY"),
    "copy of two": ({"add": ["sw_KE"], "init": ["copy:en_XX,de_DE"]}, "is none of"),
    "copy of nothing": ({"add": ["sw_KE"], "init": ["copy:"]}, "is none of"),
    "seed that is no number": ({"add": ["sw_KE"], "init": ["random:x"]}, "is none of"),
    "unknown source": ({"add": ["sw_KE"], "init": ["copy:en_X"]}, "there is no 'en_X'; did you mean en_XX?"),
    "average of one twice": ({"add": ["sw_KE"], "init": ["average:en_XX,en_XX"]}, "names en_XX twice"),
    "no code": ({"add": ["swahili"], "init": ["random"]}, '"swahili" is not a code; codes look like en_XX'),
    "a module's method": ({"add": ["pop"], "init": ["random"]}, '"pop" is not a code'),
    "a dot": ({"rename": ["de_DE=de.DE"]}, '"de.DE" is not a code'),
    "rename of nothing": ({"rename": ["nl_XX=nl_BE"]}, "has no 'nl_XX' to rename"),
    "rename onto another": ({"rename": ["de_DE=en_XX"]}, "has en_XX already; rename de_DE to another code"),
    "rename without =": ({"rename": ["de_DE"]}, "--rename de_DE must be OLD=NEW"),
    "pruned and unknown": ({"prune": ["sw_KE"]}, "has no 'sw_KE' to prune; there are en_XX"),
    "pruned all": ({"prune": [*LANGUAGES]}, "leaves no language; keep one"),
    "unknown default": ({"default": "sw_KE"}, "has no 'sw_KE' to be the default language"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(case, folder):
    changes, line = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        plan(folder, Changes(**changes))
    assert line in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def edited(folder, out, name, change):
    """A copy of a folder with one tensor changed."""
    shutil.copytree(folder, out)
    tensors = weights(out)
    change(tensors[name])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("roberta.encoder.layer.1.attention.self.key.bias", "the trunk's layers are others (sha256 in fp32 "),
        ("roberta.encoder.layer.0.output.adapter_layer_norm.weight", "the trunk's layers are others"),
        ("roberta.encoder.LayerNorm.weight", "the trunk's layers are others"),
        ("roberta.embeddings.word_embeddings.weight", "the embeddings are others, as after new vocabulary"),
        ("lm_head.bias", "the language model's head is another"),
    ],
)
def test_languages_of_another_trunk_are_not_merged(folder, tmp_path, name, line):
    """One bit of one value is enough, in a folder and in an adapter file made on it."""
    other = plan(folder, Changes(add=["sw_KE"], init=["random"])).write(tmp_path / "b")

    def flip(tensor):
        tensor.view(torch.int32).view(-1)[0] ^= 1

    other = edited(other, tmp_path / "c", name, flip)
    (file,) = plan(other, Changes()).extract(tmp_path / "files", ["sw_KE"])
    for source in (other, file):
        with pytest.raises(ValueError) as caught:
            plan(folder, Changes(merge=[source]))
        assert line in str(caught.value) and str(source) in str(caught.value) and "\n" not in str(caught.value)


def test_a_language_that_both_have_must_be_the_same(folder, tmp_path):
    name = f"roberta.encoder.layer.0{BELOW}fr_XX.dense2.bias"
    other = edited(folder, tmp_path / "b", name, lambda tensor: tensor.add_(1e-3))
    with pytest.raises(ValueError, match=r"fr_XX is in both .*; prune it from one of them, or rename it there"):
        plan(folder, Changes(merge=[other]))
    made = plan(folder, Changes(merge=[plan(other, Changes(rename=["fr_XX=fr_FR"])).write(tmp_path / "c")]))
    assert list(made.languages) == [*LANGUAGES, "fr_FR"]


def test_trunks_of_other_shapes_are_not_merged(folder, tmp_path):
    other = dataclasses.replace(CONFIG, adapter_reduction_factor=2)
    other = xlscale.save_pretrained(noisy(other), tmp_path / "b")
    with pytest.raises(ValueError, match=r"adapter_reduction_factor is 2 there and 4 here; use adapters made on this"):
        plan(folder, Changes(merge=[other]))


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "xl"])
def test_models_without_adapters_are_refused_on_either_side(family, folder, tmp_path):
    plain = xlscale.save_pretrained(noisy(FAMILIES[family]), tmp_path / "plain")
    kind = FAMILIES[family].model_type
    for changes in (Changes(add=["sw_KE"], init=["random"]), Changes()):
        with pytest.raises(ValueError, match=f"of type {kind} and has no languages to add to or take from"):
            plan(plain, changes)
    with pytest.raises(ValueError, match=f"of type {kind} and has no languages; give one of type xmod"):
        plan(folder, Changes(merge=[plain]))


def test_nothing_is_half_written_and_no_source_is_replaced(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = plan(folder, Changes(add=["sw_KE"], init=["random"]))
    with pytest.raises(ValueError, match="is a folder that is read; name another one to write"):
        made.write(folder)
    broken = edited(folder, tmp_path / "b", f"roberta.encoder.layer.1{BELOW}hi_IN.dense1.weight",
                    lambda tensor: tensor.fill_(float("nan")))  # fmt: skip
    with pytest.raises(ValueError, match=r"adapters.hi_IN.down.weight holds nan"):
        plan(broken, Changes(prune=["en_XX"])).write(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/fr_XX.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"mine/fr_XX.safetensors is not xlscale's"):
        plan(folder, Changes()).extract(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["fr_XX.safetensors"]
    assert not list(tmp_path.glob("*out*")) and {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_adapter_files_becomes_one_with_them(folder, tmp_path):
    """What they knew of tokens is in the new ones."""
    first = plan(folder, Changes(add=["sw_KE"], init=["random"])).write(tmp_path / "a", adapters=True)
    second = plan(first, Changes(prune=["en_XX"])).write(tmp_path / "b")
    assert sorted(path.stem for path in (second / "adapters").iterdir()) == ["de_DE", "fr_XX", "hi_IN", "sw_KE"]
    seen = {code: found.tokens_seen for code, found in open_adapters(second).languages.items()}
    assert seen == {"de_DE": None, "fr_XX": None, "hi_IN": None, "sw_KE": 0}
