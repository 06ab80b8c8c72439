"""New pieces and their rows: what stays stays to the bit, and old text is cut as it was where that was asked for."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.corpora import write_shards
from tests.hub_folders import FAMILIES, noisy
from tests.vocabularies import IDS, OLD, PIECES, old_tokenizer, texts
from xlscale.checkpoint.adapter_file import read_adapter_file
from xlscale.checkpoint.hub_names import VOCABULARY, hf_names
from xlscale.checkpoint.pretrained import load_pretrained, save_pretrained
from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.extend import Changes, plan
from xlscale.extend_vocabulary import VocabularyChanges, extend_vocabulary, plan_vocabulary
from xlscale.models.heads import ForMaskedLM
from xlscale.models.init import init_weights
from xlscale.tokenizer import SentencePieceTokenizer, train_sentencepiece
from xlscale.tokenizer_bpe import train_bpe
from xlscale.vocabulary_loss import HeldOut
from xlscale.vocabulary_pieces import choose_pieces, learn_candidates


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three old languages, a new one in the script of one of them, and one in a script of its own."""
    folder = tmp_path_factory.mktemp("shards")
    for language, count in {**OLD, "de_DE": 60, "hi_IN": 40}.items():
        write_shards(folder, language, count)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return old_tokenizer(tmp_path_factory.mktemp("old"))


def model_of(family: str, vocab_size: int = IDS, **changes: object):
    config = replace(FAMILIES[family], vocab_size=vocab_size, max_position_embeddings=66, **changes)
    return noisy(config)


@pytest.fixture(scope="module")
def folder(old: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the XLM-R shape, as many rows as ids."""
    return save_pretrained(model_of("xlm-roberta"), tmp_path_factory.mktemp("models") / "old", old)


def changes_of(shards: Path, **options: object) -> VocabularyChanges:
    return VocabularyChanges(**{"corpus": shards, "pieces": PIECES, "language": "de_DE", **options})  # type: ignore[arg-type]


def tensors(where: Path, model: object) -> dict[str, torch.Tensor]:
    """A folder's tensors by our names."""
    held = load_file(where / "model.safetensors")
    return {ours: held[theirs] for ours, theirs in hf_names(model).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "language", "dtype"),
    [
        ("xlm-roberta", "de_DE", torch.float32),
        ("xl", "hi_IN", torch.bfloat16),
        ("xmod", "hi_IN", torch.float32),
        ("xmod-prenorm", "de_DE", torch.float16),
    ],
)
def test_old_rows_and_all_other_tensors_stay_to_the_bit_and_the_mask_takes_its_row_along(
    old: SentencePieceTokenizer, shards: Path, tmp_path: Path, family: str, language: str, dtype: torch.dtype
) -> None:
    model = model_of(family).to(dtype)
    before = save_pretrained(model, tmp_path / "old", old)
    after = extend_vocabulary(before, tmp_path / "new", changes_of(shards, language=language))
    new = SentencePieceTokenizer.load(after)
    made = load_pretrained(after)
    assert new.vocab_size == IDS + PIECES and made.config.vocab_size == IDS + PIECES
    assert [new.token(i) for i in range(old.mask_id)] == [old.token(i) for i in range(old.mask_id)]
    assert new.mask_id == old.mask_id + PIECES
    first, second = tensors(before, model.config), tensors(after, made.config)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found = second[name]
        assert found.dtype == dtype
        if name not in VOCABULARY:
            assert torch.equal(found, tensor), name
            continue
        assert torch.equal(found[: old.mask_id], tensor[: old.mask_id])
        assert torch.equal(found[new.mask_id], tensor[old.mask_id])
        rows = found[old.mask_id : new.mask_id]
        assert len(torch.unique(rows, dim=0)) > 1 and not any(torch.equal(row, tensor[old.mask_id]) for row in rows)


def test_padding_rows_are_used_up_first_and_the_number_of_rows_stays_a_multiple_of_eight(
    old: SentencePieceTokenizer, shards: Path, tmp_path: Path
) -> None:
    model = model_of("xl", 216)
    before = save_pretrained(model, tmp_path / "old", old)
    word, config = VOCABULARY[0], model.config
    held = tensors(before, config)[word]
    few = extend_vocabulary(before, tmp_path / "few", changes_of(shards, pieces=12))
    found = tensors(few, load_pretrained(few).config)[word]
    assert len(found) == 216 and torch.equal(found[212:], held[212:])
    assert torch.equal(found[:199], held[:199]) and torch.equal(found[211], held[199])
    many = extend_vocabulary(before, tmp_path / "many", changes_of(shards, pieces=33))
    found = tensors(many, load_pretrained(many).config)[word]
    assert len(found) == 240  # 233 ids
    assert torch.equal(found[233], found[239]) and torch.allclose(found[233], held[4:199].mean(dim=0), atol=1e-6)


def test_protected_text_keeps_its_ids_and_other_pieces_take_the_place_of_those_left_out(
    old: SentencePieceTokenizer, shards: Path, folder: Path
) -> None:
    told: list[str] = []
    free = plan_vocabulary(folder, changes_of(shards, old_shards=shards), told.append)
    safe = plan_vocabulary(folder, changes_of(shards, protect=True), told.append)
    old_texts = [text for documents in safe.texts.old.values() for text in documents]
    assert sorted(safe.texts.old) == ["en_XX", "hi_IN", "ru_RU", "zh_CN"]
    assert any(free.change(documents).changed_tokens for documents in free.texts.old.values())
    for before, after in zip(old.encode_batch(old_texts), safe.new.encode_batch(old_texts), strict=True):
        assert np.array_equal(before, after)
    assert safe.left_out and safe.new.vocab_size == free.new.vocab_size
    assert not {safe.new.token(i) for i in safe.new_rows} & set(safe.left_out)


def test_what_changes_in_old_text_is_counted_per_language(
    old: SentencePieceTokenizer, shards: Path, folder: Path
) -> None:
    made = plan_vocabulary(folder, changes_of(shards))
    for old_texts in made.texts.old.values():
        found = made.change(old_texts)
        cuts = [(old.encode(text), made.new.encode(text)) for text in old_texts]
        # A new piece stands for old ones that the new cut has not; all others are in both.
        gone = sum(len(before) - sum(i < old.mask_id for i in after) for before, after in cuts)
        assert found.changed_documents == sum(before != after for before, after in cuts)
        assert found.tokens == sum(len(before) for before, _ in cuts) and found.documents == len(cuts)
        assert gone <= found.changed_tokens <= 1.2 * gone + 2


def test_the_same_corpus_gives_the_same_folder(shards: Path, folder: Path, tmp_path: Path) -> None:
    one, other = (extend_vocabulary(folder, tmp_path / name / "new", changes_of(shards)) for name in "ab")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_rows_are_the_weighted_sums_that_were_planned(shards: Path, folder: Path, tmp_path: Path) -> None:
    made = plan_vocabulary(folder, changes_of(shards))
    assert made.mixtures.kinds["mixtures of pieces like them"] > PIECES / 2
    assert made.mixtures.kinds.total() == PIECES
    out = made.write(tmp_path / "new")
    before, after = tensors(folder, made.opened.model), tensors(out, made.model)
    for name in VOCABULARY:
        for row in made.new_rows.tolist():
            ids, weights, shift = made.mixtures.of[row]
            assert weights.sum() == pytest.approx(1) and (weights > 0).all()
            parts = before[name][ids].double().reshape(len(ids), -1)
            wanted = (torch.from_numpy(weights) @ parts + (shift if name == VOCABULARY[1] else 0.0)).float()
            torch.testing.assert_close(after[name][row].reshape(-1), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["xlm-roberta", "xl", "xmod", "xmod-prenorm"])
def test_loss_layer_by_layer_is_that_of_the_whole_model(
    old: SentencePieceTokenizer, shards: Path, tmp_path: Path, family: str
) -> None:
    before = save_pretrained(model_of(family), tmp_path / "old", old)
    made = plan_vocabulary(before, changes_of(shards))
    losses = made.losses()
    assert list(losses) == ["mixture", "random"]
    for kind, loss in losses.items():
        out = replace(
            made, changes=replace(made.changes, rows=kind), mixtures=made.mixtures if kind == "mixture" else None
        )
        model = load_pretrained(out.write(tmp_path / kind))
        held_out = HeldOut(made.texts.held_out, made.new, made.model)
        options = {"lang_ids": torch.full((held_out.parts,), 1)} if family.startswith("xmod") else {}  # de_DE
        with torch.no_grad():
            logits = model(held_out.input_ids_BT, held_out.attention_BT, **options).logits
        whole = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), held_out.labels_BT.flatten(), ignore_index=IGNORE
        )
        assert loss == pytest.approx(whole.item(), rel=1e-5)


def test_held_out_documents_are_not_learnt_from_and_always_the_same(shards: Path, folder: Path) -> None:
    made, again = (plan_vocabulary(folder, changes_of(shards)) for _ in range(2))
    assert made.texts.held_out == again.texts.held_out and len(made.texts.held_out) == 4
    assert sorted([*made.texts.held_out, *made.texts.training]) == sorted(texts("de_DE", 60))


def test_another_tokenizer_brings_its_ids_and_shared_pieces_their_rows(
    old: SentencePieceTokenizer, shards: Path, folder: Path, tmp_path: Path
) -> None:
    other = train_sentencepiece([*texts("de_DE", 60), *texts("en_XX", 30)], 150, tmp_path / "other")
    for corpus in (shards, None):
        language = "de_DE" if corpus else ""
        changes = VocabularyChanges(tokenizer=tmp_path / "other", corpus=corpus, language=language)
        made = plan_vocabulary(folder, changes)
        out = made.write(tmp_path / f"new-{language}")
        new = SentencePieceTokenizer.load(out)
        assert new.digest == other.digest and made.model.vocab_size == 150
        before, after = tensors(folder, made.opened.model), tensors(out, made.model)
        ids = {old.token(i): i for i in range(old.vocab_size)}
        shared = [i for i in range(150) if new.token(i) in ids]
        assert 30 < len(shared) < 150 and sorted({*range(150)} - {*shared}) == made.new_rows.tolist()
        for name in VOCABULARY:
            assert torch.equal(after[name][shared], before[name][[ids[new.token(i)] for i in shared]])
        assert any("at other ids" in line for line in made.told())


def test_a_tokenizer_extended_before_is_taken_with_its_ids(
    old: SentencePieceTokenizer, shards: Path, folder: Path, tmp_path: Path
) -> None:
    german = texts("de_DE", 60)
    choice = choose_pieces(old, learn_candidates(old, german, 30), german, 30)
    choice.tokenizer.save(tmp_path / "extended")
    made = plan_vocabulary(folder, VocabularyChanges(tokenizer=tmp_path / "extended"))
    assert made.new_rows.tolist() == list(range(199, 229)) and made.source_V[-1] == old.mask_id
    assert any("all old ids stay" in line for line in made.told())


def test_a_text_file_will_do_and_has_a_document_a_line(folder: Path, tmp_path: Path) -> None:
    lines = [text.replace("\n", " ") for text in texts("de_DE", 60)]
    (tmp_path / "de.txt").write_text("\n\n".join(lines), encoding="utf-8")
    made = plan_vocabulary(folder, VocabularyChanges(corpus=tmp_path / "de.txt", pieces=20))
    assert len(made.texts.training) + len(made.texts.held_out) == 60 and len(made.new_rows) == 20
    assert any("--old-shards names a folder" in line for line in made.told())


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    old: SentencePieceTokenizer, shards: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("Würde\n".encode("latin-1") * 20)
    (tmp_path / "few.txt").write_text("Alle Menschen\n" * 3)
    (tmp_path / "known.txt").write_text("a\n" * 30)
    bpe = tmp_path / "bpe"
    train_bpe(texts("en_XX", 60), 300, bpe)
    roberta = save_pretrained(model_of("roberta", 300), tmp_path / "roberta", bpe)
    wide = save_pretrained(model_of("xlm-roberta", 190), tmp_path / "wide", old)
    refused = {
        r"neither a tokenizer nor a corpus": (folder, VocabularyChanges()),
        r"--pieces 0 must be at least 1": (folder, changes_of(shards, pieces=0)),
        r"rows='zeros' is not known; use one of mixture, mean, random": (folder, changes_of(shards, rows="zeros")),
        r"nowhere does not exist": (folder, changes_of(tmp_path / "nowhere")),
        r"say which one gets the pieces with --language": (folder, changes_of(shards, language="")),
        r"no shards of language 'fr_XX'": (folder, changes_of(shards, language="fr_XX")),
        r"is not text in UTF-8": (folder, changes_of(tmp_path / "latin.txt")),
        r"has 3 documents with text; at least 8": (folder, changes_of(tmp_path / "few.txt")),
        r"yields no piece that the tokenizer lacks": (folder, changes_of(tmp_path / "known.txt")),
        r"no text of old languages to protect": (folder, changes_of(shards / "de_DE", protect=True)),
        r"has a byte-level BPE": (roberta, changes_of(shards)),
        r"the tokenizer has 200 ids, vocab_size is 190": (wide, changes_of(shards)),
        r"--old-characters 0 must be at least 1": (folder, changes_of(shards, old_characters=0)),
        r"--language and --old-shards go with a corpus": (folder, VocabularyChanges(tokenizer=bpe, old_shards=shards)),
        r"taken as it is; leave out --pieces": (folder, changes_of(shards, tokenizer=bpe)),
        r"--protect chooses among new pieces": (
            folder,
            changes_of(shards, tokenizer=bpe, pieces=0, protect=True),
        ),
    }
    for message, (source, changes) in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            extend_vocabulary(source, tmp_path / "new", changes)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    with pytest.raises(ValueError, match="is a folder that is read"):
        extend_vocabulary(folder, folder, changes_of(shards))


def test_a_language_is_added_with_pieces_of_its_own_in_one_command(
    old: SentencePieceTokenizer, shards: Path, tmp_path: Path
) -> None:
    model = model_of("xmod")
    before = save_pretrained(model, tmp_path / "old", old)
    command = [
        *(sys.executable, "-m", "xlscale.cli", "extend", str(before), "--out", str(tmp_path / "new")),
        *("--add", "hi_IN", "--init", "copy:en_XX", "--add-pieces", str(shards), "--pieces", "30"),
        *("--language", "hi_IN", "--protect", "--extract", str(tmp_path / "files"), "--extract-only", "hi_IN"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "added hi_IN (id 2)" in done.stdout and "30 new pieces, ids 199 to 228; all old ids stay" in done.stdout
    assert "masked-LM loss at step 0 on hi_IN through the adapters of hi_IN" in done.stdout
    # Of the old languages only those that the model has count: de_DE and en_XX.
    assert "\nde_DE: 0.000% of" in done.stdout and "\nru_RU" not in done.stdout
    made = load_pretrained(tmp_path / "new")
    assert made.config.languages == ["en_XX", "de_DE", "hi_IN"] and made.config.vocab_size == IDS + 30
    ids = torch.tensor([[0, *old.encode("All human beings"), 2]])
    for language in range(2):
        options = {"lang_ids": torch.tensor([language])}
        with torch.no_grad():
            one, other = (m.encoder(ids, **options).last_hidden_state for m in (model, made))
        assert torch.equal(other, one)
    # The adapter file is of the new folder, whose embeddings the old one has not.
    extracted = read_adapter_file(tmp_path / "files/hi_IN.safetensors").languages["hi_IN"]
    assert extracted.tokens_seen == 0
    assert "the same in both: hi_IN" in plan(tmp_path / "new", Changes(merge=[Path(extracted.where)])).told[0]
    with pytest.raises(ValueError, match="the embeddings are others, as after new vocabulary"):
        plan(before, Changes(merge=[Path(extracted.where)]))
    card = (tmp_path / "new/README.md").read_text()
    assert "- added hi_IN (id 2): copy:en_XX" in card and "- 30 new pieces" in card and str(tmp_path) not in card


def test_a_model_whose_scores_are_no_probabilities_is_refused_before_anything_is_learnt(
    old: SentencePieceTokenizer, shards: Path, folder: Path, tmp_path: Path
) -> None:
    proto = old.parsed()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    shutil.copytree(folder, tmp_path / "bpe")
    (tmp_path / "bpe/sentencepiece.bpe.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="bpe: the SentencePiece model must be Unigram without byte fallback"):
        plan_vocabulary(tmp_path / "bpe", changes_of(shards))


@pytest.fixture(scope="module")
def trained(old: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the old languages' documents by heart."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 66}
    config = ModelConfig(model_type="xlm-roberta", vocab_size=IDS, **small, **still)  # type: ignore[arg-type]
    model = ForMaskedLM(config)
    init_weights(model, config, seed=0)
    rows = HeldOut([text for code, count in OLD.items() for text in texts(code, count)], old, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(rows.input_ids_BT, rows.attention_BT, labels=rows.labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.0
    return save_pretrained(model.eval(), tmp_path_factory.mktemp("trained") / "old", old)


@pytest.mark.parametrize("language", ["de_DE", "hi_IN"])
def test_a_trained_model_starts_better_with_mixtures_than_with_random_rows(
    trained: Path, shards: Path, language: str
) -> None:
    made = plan_vocabulary(trained, changes_of(shards, language=language))
    losses = made.losses()
    assert losses["mixture"] < losses["random"] - 0.1  # 0.46 and 1.3 here
    assert any(f"{losses['mixture']:.3f} with rows mixture, {losses['random']:.3f}" in line for line in made.told())
