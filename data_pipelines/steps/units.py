"""Units of work after reading, packed into an executor's tasks: a function of the data alone."""

import shutil
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.progress import Heartbeat

EXACT = -1  # what stands in the place of a band where whole texts are compared


class Unit(NamedTuple):
    """What is done, and published, as a whole."""

    language: str
    name: str = ""
    """Of a part of it ("00003") or of some bands ("3-5"); "" = all of the language."""
    size: int = 0
    """Bytes that it reads, about."""

    @property
    def path(self) -> str:
        """Of its folder, below that of its stage."""
        return f"{self.language}/{self.name}" if self.name else self.language


def packed(units: Iterable[Unit], size: int) -> list[list[Unit]]:
    """The units in their order, cut into tasks as soon as one has `size` bytes."""
    tasks: list[list[Unit]] = []
    room = 0
    for unit in units:
        if room <= 0:
            tasks.append([])
            room = size
        tasks[-1].append(unit)
        room -= unit.size
    return tasks


class UnitStep(PipelineStep):
    """Makes the folder `folder`/<unit> of each of its task's units, whole or not at all; made ones stay.

    Takes no documents and passes none on.
    """

    type = "xlscale"

    def __init__(self, folder: Path, tasks: list[list[Unit]], progress: Path):
        super().__init__()
        self.folder, self.tasks, self.progress = folder, tasks, progress

    @abstractmethod
    def make(self, unit: Unit, folder: Path) -> None:
        """Fill a unit's folder, which is there and empty."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        units = self.tasks[rank]
        heartbeat = Heartbeat(self.progress / f"{self.name}-{rank:05d}", sum(unit.size for unit in units))
        done = 0
        for unit in units:
            with self.track_time("units"):
                if not (self.folder / unit.path).exists():
                    beside = begin(self.folder, unit)
                    self.make(unit, beside)
                    beside.rename(self.folder / unit.path)
            done += unit.size
            heartbeat.beat(done)
        yield from ()


def begin(folder: Path, unit: Unit) -> Path:
    """An empty folder that gets the unit's name when it is filled."""
    final = folder / unit.path
    beside = final.with_name(f".{final.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside
