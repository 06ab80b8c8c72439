"""Dropped documents, put aside whole for who wants to look at them (report.all_dropped)."""

import io
import json
from pathlib import Path

import zstandard
from datatrove.data import Document

from data_pipelines.config import ReportConfig


class DroppedDocuments:
    """Writes `folder`/<reason>.jsonl.zst, nothing where there is no folder.

    A row is id, text and metadata, without the bytes of a page that was dropped before its text was extracted: archive
    and offset say where they are.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._files: dict[str, io.TextIOWrapper] = {}

    @classmethod
    def of(cls, folder: Path, config: ReportConfig) -> "DroppedDocuments":
        """In a folder of what a task makes, if the recipe asks for it."""
        return cls(folder / "dropped" if config.all_dropped else None)

    def add(self, document: Document) -> None:
        """Put a dropped document aside."""
        if self.folder is None:
            return
        reason = document.metadata["dropped"]
        if reason not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            packed = zstandard.ZstdCompressor(level=3).stream_writer((self.folder / f"{reason}.jsonl.zst").open("wb"))
            self._files[reason] = io.TextIOWrapper(packed, encoding="utf-8")
        metadata = {key: value for key, value in document.metadata.items() if key not in ("payload", "signature")}
        row = {"id": document.id, "text": document.text, "metadata": metadata}
        self._files[reason].write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")

    def close(self) -> None:
        """Finish the files."""
        for file in self._files.values():
            file.close()
