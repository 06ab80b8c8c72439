"""A Hub folder into the sharded engine: the same weights at any shape, no rank reading all of it, nothing guessed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import xlscale
from tests.distributed.conftest import BATCH, ConfigFor, shape_changes
from tests.distributed.conftest import WORKER as TRAIN
from tests.distributed.init_cases import HEAD, IDS
from tests.distributed.launch import ROOT, run, start, stop
from tests.distributed.test_faults import refused
from xlscale.checkpoint.hub_names import shapes_of
from xlscale.checkpoint.init_from import folder_rows
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import load_config
from xlscale.data.stream import open_stream
from xlscale.models.heads import MaskedLM
from xlscale.models.init import init_weights, initial_rows
from xlscale.tokenizer import train_sentencepiece
from xlscale.training.metrics import read_events, read_metrics

WORKER = str(ROOT / "tests" / "distributed" / "init_cases.py")
ROWS = 500
"""Of the folder's vocabulary; the configs have 640."""
GROWN = ("encoder.embeddings.word.weight", "head.decoder.bias")
XMOD = {"model.model_type": "xmod", "model.languages": ["de_DE", "en_XX"], "model.default_language": "en_XX"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2-tp2": ("dp2-tp2", {}),
    "dp1-tp2": ("dp1-tp2", {"model.model_type": "xlm-roberta"}),
    "xmod": ("dp2-tp1", XMOD),
}


def make_folder(path: Path, config_path: Path, tokenizer: Path, **options: Any) -> Path:
    """A masked LM of the config's shape with a smaller vocabulary, noisy in every parameter."""
    config = load_config(config_path, [f"model.vocab_size={ROWS}", "parallel.tensor_parallel=1"]).model
    model = MaskedLM(config)
    init_weights(model, config, seed=99)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return xlscale.save_pretrained(model, path, tokenizer, **options)


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ConfigFor, tiny_tokenizer_folder: Path
) -> dict[str, Path]:
    """Config of each case, after its run."""
    root = tmp_path_factory.mktemp("init")
    paths, worlds = {}, {2: [], 4: []}
    for name, (shape, changes) in CASES.items():
        changes = shape_changes(shape) | changes | {"training.init_from": str(root / f"hub-{name}")}
        paths[name] = tiny_config(root, name, changes)
        make_folder(root / f"hub-{name}", paths[name], tiny_tokenizer_folder, max_shard_size="40KB")
        worlds[4 if shape == "dp2-tp2" else 2].append(paths[name])
    for world_size, configs in worlds.items():
        run(world_size, [WORKER, *map(str, configs)], root / f"world{world_size}.log", timeout=240)
    return paths


@pytest.mark.parametrize("name", CASES)
def test_sharded_weights_are_the_folders_and_rows_beyond_it_are_the_seeds(name: str, started: dict[str, Path]) -> None:
    config = load_config(started[name])
    checkpoint = Checkpoint.open(config.run_dir / "checkpoints" / "step-00000000")
    wanted = dict(xlscale.load_pretrained(config.training.init_from).named_parameters())
    shapes = shapes_of(config.model)
    assert checkpoint.manifest["parameters"].keys() == wanted.keys() == shapes.keys()
    for parameter, values in wanted.items():
        found = checkpoint.full(parameter)
        assert torch.equal(found[: len(values)], values), parameter
        assert (len(found) > len(values)) == (parameter in GROWN)
        shape = shapes[parameter]
        added = initial_rows(parameter, shape, config.model, config.training.seed, len(values), shape[0])
        assert torch.equal(found[len(values) :], added), parameter


@pytest.mark.parametrize("name", CASES)
def test_a_rank_reads_its_own_rows_only(name: str, started: dict[str, Path]) -> None:
    """Whole rows: of matrices split by columns the other ranks' too, and two rows that are cut in the middle."""
    config = load_config(started[name])
    tp = config.parallel.tensor_parallel
    told = [json.loads(path.read_text()) for path in sorted(config.run_dir.glob("read-*.json"))]
    total = sum(torch.Size(shape).numel() for shape in shapes_of(config.model).values())
    assert len(told) == (4 if name == "dp2-tp2" else 2)
    for rank in told:
        for parameter, shape in shapes_of(config.model).items():
            width = torch.Size(shape[1:]).numel()
            assert rank["read"].get(parameter, 0) <= rank["kept"][parameter] * tp + 2 * width, parameter
        assert sum(rank["read"].values()) < 0.75 * total
    assert sum(sum(rank["kept"].values()) for rank in told) >= total


@pytest.mark.parametrize("name", CASES)
def test_head_in_the_engine_scores_as_the_head_alone(name: str, started: dict[str, Path]) -> None:
    config = load_config(started[name])
    model = xlscale.load_pretrained(config.training.init_from, HEAD, seed=config.training.seed)
    with torch.no_grad():
        wanted = model(IDS, (IDS != 1).long()).logits
    for path in config.run_dir.glob("labels-*.pt"):
        torch.testing.assert_close(torch.load(path), wanted, atol=1e-5, rtol=1e-5)


def test_training_goes_on_from_the_folders_loss(started: dict[str, Path], tmp_path: Path) -> None:
    """From a folder with all rows, so that plain torch's loss is of the same vocabulary."""
    from xlscale.training.loop import train

    origin = load_config(started["dp1-tp2"])
    checkpoint = Checkpoint.open(origin.run_dir / "checkpoints" / "step-00000000")
    model = MaskedLM(origin.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.full(name))
    folder = xlscale.save_pretrained(model, tmp_path / "hub", origin.data.tokenizer)
    sets = ["parallel.tensor_parallel=1", f"training.micro_batch_size={BATCH}", "run.name=on", "training.stop_after=1"]
    config = load_config(started["dp1-tp2"], [*sets, f"run.dir={tmp_path}", f"training.init_from={folder}"])
    train(config)
    batch = open_stream(config).batch(np.arange(BATCH))
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
    losses = model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels), mask).losses_M
    (record,) = read_metrics(config.run_dir)
    assert record["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    (start,) = [event for event in read_events(config.run_dir) if event["event"] == "start"]
    assert start["init_from"] == str(folder)


def test_folder_of_another_model_or_tokenizer_is_refused(
    started: dict[str, Path], tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = started["dp1-tp2"]
    alone = ["parallel.tensor_parallel=1", f"training.micro_batch_size={BATCH}", f"run.dir={tmp_path}"]

    *before, said = refused(path, *alone, "model.num_attention_heads=2", "model.layer_norm_eps=1e-12").splitlines()
    assert not [line for line in before if line.startswith("xlscale: ")]
    assert "model.num_attention_heads = 2 is 4 there" in said and "model.layer_norm_eps = 1e-12 is 1e-05 there" in said
    assert not list(tmp_path.glob("*/checkpoints/step-*"))

    def line(folder: Path) -> str:
        with pytest.raises(ValueError) as caught:
            folder_rows(load_config(path, [f"training.init_from={folder}"]), [])
        return str(caught.value)

    folder = Path(load_config(path).training.init_from)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    other = train_sentencepiece(["other words than those of the corpus"] * 50, 24, tmp_path / "other")
    other.save(broken)
    assert "its ids mean other pieces; set data.tokenizer to that folder" in line(broken)
    (broken / "sentencepiece.bpe.model").write_bytes(b"not a model")
    assert "not a SentencePiece model" in line(broken)
    assert f"{tmp_path / 'nowhere'} is not a folder" in line(tmp_path / "nowhere")


def test_smaller_vocabulary_other_adapters_and_an_old_pickle_are_refused(
    started: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size = 400 would cut its 500 rows"):
        folder_rows(load_config(started["dp2-tp2"], ["model.vocab_size=400"]), [])
    with pytest.raises(ValueError, match=r"16 missing \(encoder.layers.0.adapters.fr_XX.down.weight"):
        languages = 'model.languages=["fr_XX", "el_GR", "de_DE", "en_XX"]'
        folder_rows(load_config(started["xmod"], [languages]), [])
    folder = tmp_path / "hub"
    xlscale.save_pretrained(xlscale.load_pretrained(load_config(started["dp2-tp2"]).training.init_from), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = load_config(started["dp2-tp2"], [f"training.init_from={folder}"])
    for new in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        if new:
            name = "encoder.layers.1.mlp.up.weight"
            found = folder_rows(config, [])("fp32", name, 7, 9)
            assert torch.equal(found, tensors["roberta.encoder.layer.1.intermediate.dense.weight"][7:9])
        else:
            with pytest.raises(ValueError, match=r"a pickle of torch below 1.6.*run xlscale import"):
                folder_rows(config, [])


def test_nan_that_one_rank_finds_stops_all_of_them(
    started: dict[str, Path], tiny_config: ConfigFor, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "hub", started["dp1-tp2"], tiny_tokenizer_folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # a NaN, in the last parameter's last element
    weights.write_bytes(content)
    changes = CASES["dp1-tp2"][1] | {"training.init_from": str(folder)}
    config = tiny_config(tmp_path, "nan", shape_changes("dp1-tp2") | changes)
    processes = start(2, [TRAIN, str(config)], tmp_path / "log")
    try:
        assert [process.wait(120) for process in processes] == [1, 1]
    finally:
        stop(processes)
    for rank in range(2):
        assert "head.decoder.bias holds nan; weights must be finite" in (tmp_path / f"log.{rank}").read_text()
