"""The command `xlscale extend`: what it prints, writes and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import xlscale
from tests.hub_folders import noisy
from tests.test_extend import CONFIG, assert_kept


@pytest.fixture
def folder(tmp_path):
    return xlscale.save_pretrained(noisy(CONFIG), tmp_path / "hub")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "xlscale.cli", "extend", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_does_all_in_the_order_that_it_tells(folder, tmp_path):
    out, files = tmp_path / "out", tmp_path / "files"
    inits = ("--init", "average:en_XX,gl_ES", "--init", "zu_ZA=copy:sw_KE")
    actions = ("--rename", "fr_XX=gl_ES", "--add", "sw_KE", "--add", "zu_ZA", *inits, "--prune", "gl_ES,hi_IN")
    done = command(folder, "--out", out, *actions, "--extract", files, "--extract-only", "sw_KE", "--adapters")
    assert done.returncode == 2 and "there is no 'sw_KE'" in done.stderr, "of old languages, not of new ones"
    done = command(folder, "--out", out, *actions[:-4], *actions[-2:], "--extract", files, "--adapters",
                   "--init", "zu_ZA=random", "--extract-only", "sw_KE")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "renamed fr_XX to gl_ES", "added sw_KE (id 4): average:en_XX,gl_ES", "added zu_ZA (id 5): random",
        "pruned gl_ES, hi_IN; 4 languages stay", str(out), str(files / "sw_KE.safetensors"),
    ]  # fmt: skip
    assert_kept(folder, out, ["en_XX", "de_DE"])
    assert sorted(path.stem for path in (out / "adapters").iterdir()) == ["de_DE", "en_XX", "sw_KE", "zu_ZA"]
    assert (files / "sw_KE.safetensors").read_bytes() == (out / "adapters/sw_KE.safetensors").read_bytes()
    with safe_open(files / "sw_KE.safetensors", "pt") as file:
        assert file.metadata()["tokens_seen"] == "0"


def test_the_command_refuses_what_asks_for_nothing(folder, tmp_path):
    for arguments, line in (
        ((folder,), "nothing to do with"),
        ((folder, "--out", tmp_path / "out"), "--default, --extract, --adapters, --add-pieces or --tokenizer"),
        ((folder, "--prune", "fr_XX"), "--out is missing; name the folder to write"),
        ((folder, "--extract-only", "fr_XX", "--prune", "hi_IN", "--out", tmp_path / "out"), "is for --extract DIR"),
        (
            (folder, "--extract-only", "fr_XX", "--add-pieces", folder, "--out", tmp_path / "out"),
            "is for --extract DIR",
        ),
        ((folder, "--add-pieces", folder, "--pieces", "9", "--extract", tmp_path / "files"), "--out is missing"),
        ((tmp_path / "nowhere", "--prune", "fr_XX", "--out", tmp_path / "out"), "nowhere is not a folder"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "files").exists()
