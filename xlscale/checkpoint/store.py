"""A checkpoint is a folder that is complete or does not count: each rank writes its partitions, any shape reads them.

    step-00000100/
      manifest.json                         step, slot, topology, every parameter's full shape and group of the
                                            optimizer, each group's hyper-parameters, digests of every file
      config.toml  stream.json              the resolved config; the stream's position and fingerprints
      faults.json                           the skipped updates, and the losses that a spike is measured by
      data_faults.json                      the samples replaced so far, by shard and cause
      means.json                            means of metrics since the checkpoint before, by which the best are kept
      probe.safetensors                     the logits of a few fixed inputs, to be found again after loading
      tokenizer/                            as on the Hub, so that an export needs nothing else
      partitions-tp00-dp0000.safetensors    flat fp32 weight and moments of that rank, by parameter name

It is written beside under another name, flushed, renamed, and only then pointed to by the link `latest` (saver.py). No
state of a generator stands in it: every draw is a function of the seed and a slot (training/generators.py).
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from xlscale.checkpoint.partition_file import part_digest, partition_file
from xlscale.checkpoint.states import read_state
from xlscale.data.shards import fsync_path
from xlscale.parallel.sharded import KINDS, share

FORMAT = 2
MANIFEST = "manifest.json"
READERS = 4
"""Threads that read files for their digests: a disk of a network serves several better than one."""


def _seal(manifest: dict[str, Any]) -> str:
    """Digest of a manifest, over everything but the digest itself."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's bytes depend on."""
    return {package: version(package) for package in ("xlscale", "torch", "deepspeed", "fairscale", "safetensors")}


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seal the manifest of `partial`, whose other files are flushed, rename it to `final`, and point to that."""
    manifest["seal"] = _seal(manifest)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    fsync_path(partial / MANIFEST)
    fsync_path(partial)
    if final.exists():  # the same step was saved before, and the run has gone on from an earlier one
        final.rename(final.with_suffix(".removed"))
    partial.rename(final)
    fsync_path(final.parent)


class OtherFormatError(ValueError):
    """A whole checkpoint that this version cannot read."""


@dataclass
class Checkpoint:
    """A whole checkpoint, read memory-mapped: any rows of any parameter, whatever topology wrote it."""

    folder: Path
    manifest: dict[str, Any]
    _pieces: dict[tuple[str, int], list[tuple[int, int, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a folder whose manifest is whole and whose files have their sizes; ValueError says what is not."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not a whole checkpoint: {MANIFEST}: {error}; use another step") from None
        if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest):
            raise ValueError(f"{folder} is not a whole checkpoint: {MANIFEST} was changed after it was written")
        if manifest["format"] != FORMAT:
            raise OtherFormatError(
                f"{folder} has format {manifest['format']}, this version of xlscale reads {FORMAT}; use the one that "
                f"wrote it, {manifest['versions']['xlscale']}"
            )
        for name, entry in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                raise ValueError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; use another step")
        return cls(folder, manifest)

    @property
    def step(self) -> int:
        """Updates done when it was written."""
        return int(self.manifest["step"])

    def state(self, name: str) -> dict[str, Any]:
        """One of the `states` that it was saved with; empty when it was saved without."""
        return read_state(self.folder, name, self.manifest["files"])

    def damaged(self, names: Iterable[str], kinds: Collection[str] = KINDS) -> list[str]:
        """Which of the files do not have the digests that the manifest gives; of partitions only `kinds` are read."""

        def differs(part: tuple[str, list[Any]]) -> str:
            name, (start, stop, digest) = part
            return name if part_digest(self.folder / name, start, stop) != digest else ""

        parts = [
            (name, place)
            for name in names
            for part, place in self.manifest["files"][name]["parts"].items()
            if part not in KINDS or part in kinds
        ]
        with ThreadPoolExecutor(READERS) as readers:
            wrong = dict.fromkeys(filter(None, readers.map(differs, parts)))
        return [str(self.folder / name) for name in wrong]

    def full(self, name: str, kind: str = KINDS[0]) -> torch.Tensor:
        """A whole parameter (or moment), fp32."""
        return self.rows(kind, name, 0, self.manifest["parameters"][name]["shape"][0])

    def rows(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` along dimension 0 of the whole parameter, fp32; only their bytes are read."""
        shape: list[int] = self.manifest["parameters"][name]["shape"]
        dim = self.manifest["parameters"][name]["split_dim"]
        tp = self.manifest["topology"]["tp"]
        width = 1
        for size in shape[1:]:
            width *= size
        if dim is None:
            flat = self._flat(kind, name, 0, start * width, stop * width)
        elif dim == 0:
            parts = []
            for tp_rank in range(tp):
                low, high = share(shape[0], tp_rank, tp)
                first, last = max(start, low) - low, min(stop, high) - low
                parts.append(self._flat(kind, name, tp_rank, first * width, last * width))
            flat = torch.cat(parts)
        else:
            narrow = width // tp
            blocks = [
                self._flat(kind, name, rank, start * narrow, stop * narrow).view(-1, narrow) for rank in range(tp)
            ]
            flat = torch.cat(blocks, 1)
        return flat.reshape(stop - start, *shape[1:])

    def _flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of one tensor-parallel slice, put together from its partitions."""
        parts = [torch.empty(0)]
        for first, size, file in self._partitions(name, tp_rank):
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                parts.append(file.get_slice(f"{kind}/{name}")[low - first : high - first])
        return torch.cat(parts)

    def _partitions(self, name: str, tp_rank: int) -> list[tuple[int, int, Any]]:
        """(first element, elements, open file) of every partition of one slice."""
        if not self._pieces:
            for rank in range(self.manifest["topology"]["tp"]):
                for dp_rank in range(self.manifest["topology"]["dp"]):
                    file = safe_open(str(self.folder / partition_file(rank, dp_rank)), framework="pt")
                    for parameter, first in json.loads(file.metadata()["starts"]).items():
                        size = file.get_slice(f"{KINDS[0]}/{parameter}").get_shape()[0]
                        self._pieces.setdefault((parameter, rank), []).append((first, size, file))
        return self._pieces[name, tp_rank]
