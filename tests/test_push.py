"""Uploads: what arrives, what a failure leaves, and that the token is told to nobody but the Hub."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub
from xlscale.checkpoint.push import TOKEN, Pusher, upload

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files as of an export."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text('---\nlanguage:\n- "no"\n---\ncard')
    (tmp_path / "hub" / "model-00001-of-00001.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that refuses the first upload, found by every process that is started here."""
    server = FakeHub(refusals=1)
    for name, value in {TOKEN: f"{SECRET}\n", "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_failed_upload_is_told_without_the_token_and_the_next_one_arrives_whole(hub: FakeHub, folder: Path) -> None:
    hub.files |= {"model.safetensors": b"of an earlier upload", "notes.md": b"of a person"}
    pusher = Pusher("org/name", private=True, hours=0.01)
    assert pusher.push(folder, 100) == []
    (refused,) = pusher.close()
    assert not refused["ok"] and refused["of_step"] == 100
    assert "403" in refused["problem"] and "Bearer ***" in refused["problem"] and SECRET not in str(refused)
    assert hub.files.keys() == {"model.safetensors", "notes.md"}

    assert pusher.push(folder, 200) == []
    (done,) = pusher.close()
    assert done["ok"] and done["url"].startswith(f"{hub.url}/org/name/commit/"), done
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files == written | {"notes.md": b"of a person"}, "what would be loaded before the new files is gone"
    assert hub.messages == ["Weights after update 200"]
    assert {made["visibility"] for made in hub.created} == {"private"}
    assert hub.tokens == {f"Bearer {SECRET}"}


def test_of_folders_that_wait_the_newest_is_uploaded(hub: FakeHub, folder: Path) -> None:
    hub.refusals = 0
    pusher = Pusher("org/name", private=False, hours=0.01)
    told = [outcome for step in (1, 2, 3) for outcome in pusher.push(folder, step)] + pusher.close()
    assert [outcome["of_step"] for outcome in told] == [1, 3]
    assert hub.messages == ["Weights after update 1", "Weights after update 3"]


def test_upload_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, folder: Path) -> None:
    hub.stuck = True
    pusher, started = Pusher("org/name", private=True, hours=1.0 / 3600), time.monotonic()
    told = pusher.push(folder, 1) + pusher.close()
    assert [(t["ok"], t["problem"]) for t in told] == [(False, "not done after 1 seconds")]
    assert time.monotonic() - started < 10.0


def test_without_a_token_nothing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    """Not even where huggingface_hub finds a token that a person has left on this machine."""
    monkeypatch.delenv(TOKEN)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(SECRET)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="HF_TOKEN is not set; set it to a token that may write to org/name"):
        upload(folder, "org/name", True, "message")
    pusher = Pusher("org/name", private=True, hours=0.01)
    (told,) = pusher.push(folder, 1) + pusher.close()
    assert not told["ok"] and "HF_TOKEN is not set" in told["problem"]
    assert not hub.uploads
