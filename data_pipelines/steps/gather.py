"""Gather and join: a language's documents of all tasks by their ids, in parts; and which of them share a key."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_pipelines.config import DeduplicateConfig
from data_pipelines.steps.collect import collected_runs
from data_pipelines.steps.columns import Parts, column, mapped
from data_pipelines.steps.join import band_keys, mark_firsts, mark_lists
from data_pipelines.steps.runs import facts_type, merge_runs
from data_pipelines.steps.units import EXACT, Unit, UnitStep

ROWS = 512  # documents whose facts are in memory together


COLUMNS = (("exact", "exact", "exact"), ("near", "signatures", "signature"),
           ("paragraphs", "paragraph_ends", "paragraphs_end"))  # fmt: skip
"""Of which step, the name of its column, and of its field in facts_type()."""


class Gathered:
    """The columns of a language, part after part; a place is a number over all of them."""

    def __init__(self, folder: Path):
        self.parts = sorted(folder.glob("[0-9]*"))
        self.sizes = [(part / "ids").stat().st_size // 16 for part in self.parts]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.parts))]

    @property
    def total(self) -> int:
        """Number of documents."""
        return sum(self.sizes)

    def column(self, name: str, dtype: object, width: int = 0) -> Parts:
        """A column by its name."""
        return Parts([mapped(part / name, dtype, width) for part in self.parts])

    def band(self, band: int) -> Parts:
        """The keys of a band."""
        arrays = (mapped(part / "bands", "<u8") for part in self.parts)
        return Parts([a[band * n : (band + 1) * n] for a, n in zip(arrays, self.sizes, strict=True)])


class GatherDocuments(UnitStep):
    """Merges the runs that CollectDocuments has written in `source` to the parts of each language.

    Of `parts` of a language each has an equal share of all ids that may be. Writes documents.jsonl and columns: ids (16
    bytes), exact (16), bands (one after the other, 8 each), signatures (4 a hash); paragraphs (PARAGRAPH),
    paragraph_ends (8). On the heap are 64 bytes for each document of the part; some runs.MOST_FILES files are open.
    """

    name = "gather"

    def __init__(
        self,
        folder: Path,
        tasks: list[list[Unit]],
        progress: Path,
        source: Path,
        parts: dict[str, int],
        compared: list[str],
        config: DeduplicateConfig,
    ):
        super().__init__(folder, tasks, progress)
        self.source, self.parts, self.compared = source, parts, compared
        self.bands = config.bands if "near" in compared else 0
        self.facts = facts_type(self.bands * config.rows)

    def make(self, unit: Unit, folder: Path) -> None:
        runs = collected_runs(self.source, unit.language)
        merge_runs(runs, folder / "merged", self.facts, int(unit.name), self.parts[unit.language])
        (folder / "merged.jsonl").rename(folder / "documents.jsonl")
        (folder / "merged.paragraphs").rename(folder / "paragraphs")
        columns = {"ids": "id"} | {column: field for step, column, field in COLUMNS if step in self.compared}
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / name).open("wb")) for name in columns}
            rows = mapped(folder / "merged.facts", self.facts)
            if self.bands:
                keys = column(folder / "bands", np.uint64, (self.bands, len(rows)))
            for start in range(0, len(rows), ROWS):
                block = rows[start : start + ROWS]
                for name, field in columns.items():
                    files[name].write(block[field].tobytes())
                if self.bands:
                    keys[:, start : start + ROWS] = band_keys(block["signature"], self.bands)
        (folder / "merged.facts").unlink()


class JoinKeys(UnitStep):
    """Finds the documents of a language that share a band, or the whole text: `keys` are numbers of bands, or EXACT.

    A unit's name is which of them it looks at, "3-5" for keys[3:5]. Writes lists, one band after the other, as
    join.mark_lists() sets them, and first as join.mark_firsts().

    In the place of datatrove's MinhashDedupBuckets and -Cluster: those keep documents by the order of their files, take
    a chain of pairs for one cluster without a look at whole signatures, and hold it in one process' dict (0.10: 148
    bytes of heap for each document that has a duplicate). Here a process takes `memory_mib`.
    """

    name = "join"

    def __init__(
        self, folder: Path, tasks: list[list[Unit]], progress: Path, source: Path, keys: list[int], memory_mib: int
    ):
        super().__init__(folder, tasks, progress)
        self.source, self.keys, self.memory = source, keys, memory_mib * 2**20

    def make(self, unit: Unit, folder: Path) -> None:
        gathered = Gathered(self.source / unit.language)
        begin, end = map(int, unit.name.split("-"))
        total = gathered.total
        bands = [key for key in self.keys[begin:end] if key != EXACT]
        lists = column(folder / "lists", np.uint32, (len(bands), total + 1))
        for key in self.keys[begin:end]:
            if key == EXACT:
                keys = gathered.column("exact", "<u8", 2).whole(folder / "keys")
                mark_firsts(keys, self.memory, column(folder / "first", np.uint32, (total,)))
            else:
                mark_lists(gathered.band(key).whole(folder / "keys"), self.memory, lists[bands.index(key)])
            (folder / "keys").unlink(missing_ok=True)


def joined_bands(folder: Path, total: int) -> list[np.ndarray]:
    """What JoinKeys has left of all bands in the folder of a language with so many documents."""
    units = sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name.partition("-")[0]))
    return [lists for unit in units for lists in mapped(unit / "lists", np.uint32, total + 1)]
