"""The chain of a recipe: what the names in its `steps` are, and which of them run together.

Every step is a datatrove PipelineStep that works by itself, in any pipeline of datatrove's or from the command line
(`python -m data_pipelines step NAME RECIPE`).
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.config import Recipe, RecipeError
from data_pipelines.config_rules import CORPUS_STEPS
from data_pipelines.steps.clean import CleanText
from data_pipelines.steps.document import REASONS, DocumentStep
from data_pipelines.steps.extract import ExtractText
from data_pipelines.steps.filter import FilterQuality
from data_pipelines.steps.identify import IdentifyLanguage
from data_pipelines.steps.mask import MaskAddresses
from data_pipelines.steps.perplexity import SortByPerplexity
from data_pipelines.steps.quality import CheckQuality
from data_pipelines.steps.refuse import RefusePages

# Steps that look at one page at a time.
PAGES: dict[str, Callable[[Recipe], PipelineStep]] = {
    "refuse": lambda recipe: RefusePages(recipe.read.blocklist, recipe.read.robots),
    "extract": lambda recipe: ExtractText(recipe.extract),
    "clean": lambda recipe: CleanText(recipe.clean),
    "mask": lambda recipe: MaskAddresses(recipe.mask),
    "identify": lambda recipe: IdentifyLanguage(recipe.identify),
    "filter": lambda recipe: FilterQuality(recipe.filter),
    "quality": lambda recipe: CheckQuality(recipe.filter.rules, recipe.filter.thresholds),
    "perplexity": lambda recipe: SortByPerplexity(recipe.perplexity),
}


class Chain(NamedTuple):
    """The names of a recipe's steps, cut where documents of all archives come together."""

    pages: list[str]
    """On the pages of an archive, after read."""
    corpus: list[str]
    """On all documents of a language: exact, near, paragraphs, hold_out."""
    kept: list[str]
    """On the documents of a language that are left, before write."""


def cut(steps: tuple[str, ...]) -> Chain:
    """The chain of a recipe whose steps are right (config_load.wrong_steps)."""
    first = next(place for place, name in enumerate(steps) if name in CORPUS_STEPS)
    rest = steps[first : steps.index("write")]
    return Chain(
        list(steps[1:first]),
        [name for name in rest if name in CORPUS_STEPS],
        [name for name in rest if name not in CORPUS_STEPS],
    )


def made(names: list[str], recipe: Recipe) -> list[PipelineStep]:
    """The steps of these names; RecipeError for one of the user's that its file does not have."""
    return [OwnStep(name) if ":" in name else PAGES[name](recipe) for name in names]


class OwnStep(PipelineStep):
    """A step of the user's, "file.py:Class": a DocumentStep that is made without arguments.

    The file is loaded where the task runs, so that it need not be importable there.
    """

    type = "own"

    def __init__(self, place: str):
        self.path, _, self.class_name = place.rpartition(":")
        self.path = str(Path(self.path).resolve())
        self.name = self.class_name
        super().__init__()
        self.load()  # what is wrong with it shows before anything runs

    def load(self) -> DocumentStep:
        """The step, made anew."""
        name = f"xlscale_own_{Path(self.path).stem}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            step: DocumentStep = getattr(module, self.class_name)()
        except Exception as error:  # whatever the user's lines raise
            raise RecipeError([f"{self.path}:{self.class_name}: cannot be made ({error!r}); mend it there"]) from error
        REASONS[self.class_name] = step.reasons
        return step

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        step = self.load()
        step.stats = self.stats
        yield from step.run(data, rank, world_size)
