"""A fastText model that identifies languages: GlotLID, OpenLID, lid.176, or one of the user's own.

GlotLID: Kargaran et al. 2023 (arXiv 2310.16248); OpenLID: Burchell et al. 2023 (arXiv 2305.13820); lid.176: Joulin et
al. 2016 (arXiv 1607.01759).
"""

import functools
from typing import Any, NamedTuple

from data_pipelines.steps.corpora import language_of_name

PREFIX = "__label__"
BEST = 3  # labels of a text that are looked at: dialects that are one language to us share its probability


class Guess(NamedTuple):
    """A language: our code, or None and the model's label; and from 0 to 1 how sure the model is."""

    code: str | None
    label: str
    probability: float


class Model:
    """A model, loaded; the text of a page may be cut before, fastText takes a second for a megabyte."""

    def __init__(self, path: str):
        import fasttext  # an extra: config_load.py says so before anything runs

        self.model: Any = fasttext.load_model(path)
        # All labels; not by get_labels(), which the package fasttext-predict lacks.
        labels = {label.removeprefix(PREFIX) for label in self.model.predict("a", k=-1, threshold=-1.0)[0]}
        self.codes = {label: language_of_name(label) for label in labels}
        # Names of Wikipedias, as lid.176 has them, where als is Alemannic and not the Albanian of ISO 639-3.
        if {"als", "sq"} <= labels:
            self.codes["als"] = None

    def guess(self, text: str) -> Guess:
        """The most probable language."""
        # In fastText a line is a document; a lone surrogate is no UTF-8.
        line = " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
        labels, probabilities = self.model.predict(line, k=BEST)
        sums: dict[str | None, float] = {}
        guesses = []
        for label, probability in zip(labels, probabilities, strict=True):
            name = label.removeprefix(PREFIX)
            key = self.codes[name] or name
            sums[key] = sums.get(key, 0.0) + float(probability)
            guesses.append((key, self.codes[name], name))
        if not guesses:
            return Guess(None, "", 0.0)
        key, code, name = max(guesses, key=lambda guess: sums[guess[0]])
        return Guess(code, name, min(1.0, sums[key]))


@functools.lru_cache(maxsize=1)
def load(path: str) -> Model:
    """The model, loaded once in a process: GlotLID takes 1.7 GB."""
    return Model(path)
