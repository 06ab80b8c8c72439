"""The engine's universal layout: whole tensors, a folder for each parameter.

zero/<name>/{fp32,exp_avg,exp_avg_sq}.pt    {"param": tensor, ...}; of ZeRO-3 at tp 1 the bare tensor, flat
zero/<name>/step.pt                         AdamW's count; of ZeRO-3 it is in zero/optimizer_state.pt
*_model_states.pt                           the ranks' files as they were, for their counts
"""

from pathlib import Path
from typing import Any

import torch

from xlscale.checkpoint.engine_files import MODEL, ZERO, EngineFiles, names_in
from xlscale.parallel.sharded import FP32, KINDS, MOMENTS

PARAM, STEP, OPTIMIZER = "param", "step.pt", "optimizer_state.pt"


class UniversalFiles(EngineFiles):
    """To its reader a grid of one rank."""

    def __init__(self, folder: Path, unsafe: bool = False) -> None:
        super().__init__(folder, unsafe)
        models = {folder / name: self.read_dict(folder / name) for name in names_in(folder) if MODEL.fullmatch(name)}
        if not models:
            raise ValueError(f"{folder} has no *_model_states.pt, which tell the number of updates; copy one too")
        self.take_counts(models)
        self._last: tuple[Path, torch.Tensor] | None = None
        self.shapes = [{}]
        steps: dict[Path, Any] = {}
        places = [place for place in sorted((folder / ZERO).iterdir()) if place.is_dir()]
        held = {place: [kind for kind in KINDS if (place / f"{kind}.pt").is_file()] for place in places}
        trained = any(set(kinds) >= set(MOMENTS) for kinds in held.values())
        for place, kinds in held.items():
            if trained and kinds == [FP32]:
                # Below ZeRO-3 the converter puts in what the optimizer knows nothing of: buffers, tied weights by their
                # second names, and of those the first tensor-parallel rank's slice only.
                continue
            for kind in KINDS if trained else (FP32,):
                if kind not in kinds:
                    raise ValueError(f"{place / kind}.pt is missing; copy it too")
            self._take_shape(place, kinds)
            if (place / STEP).is_file():
                steps[place / STEP] = self.read(place / STEP)
        if not self.shapes[0]:
            raise ValueError(f"{folder / ZERO} has no parameters; copy what is in it too")
        if trained:
            self._take_steps(steps)

    def _take_shape(self, place: Path, kinds: list[str]) -> None:
        shapes = set()
        for kind in kinds:
            tensor, bare = self._tensor(place / f"{kind}.pt", checked=False)
            shapes.add(tuple(tensor.shape))
            if bare and tensor.dim() == 1:
                self.shapeless.add(place.name)
        if len(shapes) > 1:
            raise ValueError(f"{place}: {', '.join(kinds)} have shapes {sorted(shapes)}; copy them anew")
        self.shapes[0][place.name] = shapes.pop()

    def _take_steps(self, steps: dict[Path, Any]) -> None:
        path = self.folder / ZERO / OPTIMIZER
        if not steps and path.is_file():
            state = self.read_dict(path).get("optimizer_state_dict") or {}
            steps = {path / str(number): each["step"] for number, each in state.get("state", {}).items()}
        if not steps:
            raise ValueError(
                f"{self.folder / ZERO} tells AdamW's step neither in */{STEP} nor in {OPTIMIZER}; copy that"
            )
        self.take_optimizer_steps(steps)

    def _tensor(self, path: Path, checked: bool = True) -> tuple[torch.Tensor, bool]:
        """The tensor of a file, mapped, and whether it stands there bare."""
        content = self.read(path, checked)
        tensor = content.get(PARAM) if isinstance(content, dict) else content
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path} holds no tensor of numbers, as ds_to_universal writes it; copy it anew")
        return tensor.detach(), not isinstance(content, dict)

    def flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        path = self.folder / ZERO / name / f"{kind}.pt"
        if self._last is None or self._last[0] != path:
            self._last = path, self._tensor(path)[0]
        return self._last[1].reshape(-1)[start:stop].float()
