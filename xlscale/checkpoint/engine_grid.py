"""The dp x tp grid of files in which the engine saves ZeRO stages 1 to 3.

    [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt    data-parallel rank 0, tensor-parallel rank 0: flat groups
    zero_pp_rank_0_mp_rank_00_model_states.pt           stage 3: what lies in them in which order, and counts
    mp_rank_00_model_states.pt                          stages 1 and 2: the same, of a tensor-parallel rank

Saved into a folder that held another topology's files, the engine leaves those, and its own load takes them in.
"""

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xlscale.checkpoint.engine_files import MODEL, OPTIM, EngineFiles, check_alike, check_integers, more, names_in
from xlscale.checkpoint.weights import MAPPED
from xlscale.parallel.sharded import FP32, MOMENTS

OTHERS = re.compile(r"layer_.*|expert_.*|expp_rank_.*|.*mp_rank_\d+_\d+_.*|offloaded_tensors")
"""Of a pipeline, of experts, of an optimizer on a disk."""
LEFT = "another run left it; remove what that run left, or take another tag"

Rank = tuple[int, int]
"""(tensor-parallel rank, data-parallel rank)"""


class Piece(NamedTuple):
    """What one data-parallel rank's file has of a slice."""

    dp_rank: int
    group: int
    offset: int
    """In the flat group."""
    begin: int
    """In the flat slice."""
    size: int


class GridFiles(EngineFiles):
    """Every file is there, is whole, and is of the same run."""

    def __init__(self, folder: Path, unsafe: bool = False) -> None:
        super().__init__(folder, unsafe)
        self._pieces: dict[tuple[int, str], list[Piece]] = {}
        self._mapped: dict[Rank, list[dict[str, torch.Tensor]]] = {}
        self._read = 0
        if odd := [name for name in names_in(folder) if OTHERS.fullmatch(name)]:
            raise ValueError(
                f"{folder / odd[0]} is of a pipeline, of experts, or of an optimizer on a disk; only a dp x tp grid of "
                "ZeRO stages 1 to 3 is read"
            )
        self._optims = self._optim_files()
        models, self._deep = self._model_files()
        contents = {path: self.read_dict(path) for path in models.values()}
        self._take_worlds(contents)
        self._check_names(set(models), next(iter(contents)).name)
        self.take_counts(contents)
        frozen = [name for content in contents.values() for name in content.get("frozen_param_shapes") or {}]
        if frozen:
            raise ValueError(f"{folder}: {frozen[0]} is frozen, without moments; only a model trained whole is read")
        for path, content in contents.items():
            if not isinstance(content.get("param_shapes"), list):
                raise ValueError(f"{path} has no param_shapes: it is of ZeRO stage 0; stages 1 to 3 are read")
        layouts = [contents[models[tp_rank, 0]]["param_shapes"] for tp_rank in range(self.tp)]
        self.shapes = [{name: tuple(shape) for group in layout for name, shape in group.items()} for layout in layouts]
        self._open_optims(layouts)

    def _optim_files(self) -> dict[Rank, Path]:
        found: dict[Rank, Path] = {}
        for match in filter(None, map(OPTIM.fullmatch, names_in(self.folder))):
            rank = int(match["tp"]), int(match["dp"])
            if rank in found:
                raise ValueError(
                    f"{self.folder} holds both {found[rank].name} and {match[0]}: two runs wrote into it; remove the "
                    "files of one"
                )
            found[rank] = self.folder / match[0]
        if not found:
            raise ValueError(
                f"{self.folder} has no *_optim_states.pt: it is of ZeRO stage 0, or a copy without them; stages 1 to 3 "
                "are read, and the universal layout"
            )
        return dict(sorted(found.items()))

    def _model_files(self) -> tuple[dict[Rank, Path], bool]:
        """The files of model states, and whether they are of stage 3, where every rank has one."""
        found = [match for match in map(MODEL.fullmatch, names_in(self.folder)) if match]
        deep = [match["dp"] is not None for match in found]
        if not found:
            raise ValueError(f"{self.folder} has no *_model_states.pt, which tell what the others hold; copy them too")
        if any(deep) and not all(deep):
            raise ValueError(
                f"{self.folder} holds {found[0][0]} of a lower stage and {found[-1][0]} of ZeRO-3: two runs wrote into "
                "it; remove the files of one"
            )
        models = {(int(match["tp"]), int(match["dp"] or 0)): self.folder / match[0] for match in found}
        return dict(sorted(models.items())), all(deep)

    def _take_worlds(self, models: dict[Path, dict[str, Any]]) -> None:
        for path, model in models.items():
            check_integers(path, model, ("dp_world_size", "mp_world_size"))
            stages = (model.get("checkpoint_parallel_dimensions") or {}).get("pp_degree") or 1
            if stages != 1:
                raise ValueError(f"{path} is of a pipeline of {stages} stages; only a dp x tp grid is read")
        for key in ("dp_world_size", "mp_world_size"):
            check_alike(key, {path: model[key] for path, model in models.items()})
        model = next(iter(models.values()))
        self.dp, self.tp = model["dp_world_size"], model["mp_world_size"]

    def _check_names(self, models: set[Rank], told: str) -> None:
        """ValueError for a rank without a file, and for a file without a rank."""
        ranks = {(tp_rank, dp_rank) for tp_rank in range(self.tp) for dp_rank in range(self.dp)}
        wanted = ranks if self._deep else {(tp_rank, 0) for tp_rank in range(self.tp)}
        precision = next(iter(self._optims.values())).name.partition("zero")[0]
        tails = {f"{precision}zero_pp_rank_{{1}}_mp_rank_{{0:02d}}_optim_states.pt": (set(self._optims), ranks)}
        tails["zero_pp_rank_{1}_" * self._deep + "mp_rank_{0:02d}_model_states.pt"] = (models, wanted)
        stale = [name.format(*rank) for name, (found, all_) in tails.items() for rank in sorted(found - all_)]
        missing = [name.format(*rank) for name, (found, all_) in tails.items() for rank in sorted(all_ - found)]
        grid = f"dp {self.dp} x tp {self.tp}, which {told} tells"
        if stale:
            raise ValueError(f"{self.folder / stale[0]}{more(stale)} is of no rank of {grid}: {LEFT}")
        if missing:
            raise ValueError(f"{self.folder / missing[0]}{more(missing)} is missing of {grid}; copy it too")

    def _open_optims(self, layouts: list[list[dict[str, Any]]]) -> None:
        """Look at every rank's file: where in it the parameters lie, and the optimizer's count."""
        steps: dict[Path, float] = {}
        for (tp_rank, dp_rank), path in self._optims.items():
            state = self._state(path)
            self._take_pieces(path, state, tp_rank, dp_rank, layouts[tp_rank])
            counts = {float(moments["step"]) for moments in state["moments"].values()}
            if len(counts) > 1:
                raise ValueError(f"{path}: its groups are at steps {sorted(counts)}; only one count for all is read")
            steps |= dict.fromkeys([path] * len(counts), *counts)
        without = [path for path in self._optims.values() if path not in steps]
        if without and steps:
            raise ValueError(f"{without[0]} has no moments, {next(iter(steps)).name} has; copy it anew")
        self.take_optimizer_steps(steps)
        for (tp_rank, name), pieces in self._pieces.items():
            held, shape = sum(piece.size for piece in pieces), self.shapes[tp_rank][name]
            if held != prod(shape):
                raise ValueError(
                    f"{self.folder}: tensor-parallel rank {tp_rank} holds {held} elements of {name}, whose shape is "
                    f"{list(shape)}; copy its files anew"
                )

    def _state(self, path: Path, checked: bool = False) -> dict[str, Any]:
        """One rank's file: its flat groups, their moments, their hyper-parameters, and below stage 3 who lies where."""
        state = self.read_dict(path, checked).get("optimizer_state_dict")
        groups, base = "single_partition_of_fp32_groups", "base_optimizer_state"
        if self._deep:
            groups, base = "fp32_flat_groups", "optimizer_state_dict"
        if (
            not isinstance(state, dict)
            or not isinstance(state.get(groups), list)
            or not isinstance(state.get(base), dict)
        ):
            stage = "stage 3" if self._deep else "stage 1 or 2 (without elastic_checkpoint)"
            raise ValueError(f"{path} is not of ZeRO {stage}, as the model states beside it are: {LEFT}")
        count = state.get("partition_count")
        for ranks in count if isinstance(count, list) else [count]:
            if ranks != self.dp:
                raise ValueError(f"{path} is of {ranks} data-parallel ranks, the model states of {self.dp}: {LEFT}")
        self.stage = int(state.get("zero_stage", 1))
        return {
            "groups": [tensor.detach() for tensor in state[groups]],
            "moments": state[base].get("state", {}),
            "hyper": state[base].get("param_groups", []),
            "addresses": state.get("param_slice_mappings"),
        }

    def _take_pieces(
        self, path: Path, state: dict[str, Any], tp_rank: int, dp_rank: int, layout: Sequence[dict[str, Any]]
    ) -> None:
        """Where in a file's groups the parameters lie; files come in the order of data-parallel ranks."""
        moments = state["moments"]
        if not len(layout) == len(state["groups"]) == len(moments or layout):
            raise ValueError(f"{path} has {len(state['groups'])} groups, the model states {len(layout)}: {LEFT}")
        for number, group in enumerate(layout):
            hyper: dict[str, Any] = next((each for each in state["hyper"] if number in each.get("params", [])), {})
            self.groups |= dict.fromkeys(group, hyper)
            held = [state["groups"][number], *(moments[number][kind] for kind in MOMENTS if moments)]
            offset, length = 0, min(map(len, held))
            for name, shape in group.items():
                pieces = self._pieces.setdefault((tp_rank, name), [])
                if self._deep:  # an equal share of each slice, rounded up, one after the other
                    each = -(-prod(shape) // self.dp)
                    begin = min(dp_rank * each, prod(shape))
                    piece = Piece(dp_rank, number, offset, begin, min(each, prod(shape) - begin))
                    offset += each
                else:  # what this rank has of the group's flat order: a part of the slice, or nothing
                    begin = pieces[-1].begin + pieces[-1].size if pieces else 0
                    address = state["addresses"][number].get(name)
                    start, size = (address.start, address.numel) if address else (0, 0)
                    piece = Piece(dp_rank, number, start, begin, size)
                if piece.size and piece.offset + piece.size > length:
                    raise ValueError(f"{path}: group {number} has {length} elements, too few for {name}; copy it anew")
                pieces.append(piece)

    def flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        parts = [torch.empty(0)]
        for piece in self._pieces[tp_rank, name]:
            low, high = max(start, piece.begin), min(stop, piece.begin + piece.size)
            if low < high:
                first = piece.offset + low - piece.begin
                parts.append(self._kinds(tp_rank, piece.dp_rank)[piece.group][kind][first : first + high - low])
        self._read += 4 * (stop - start)
        return torch.cat(parts)

    def _kinds(self, tp_rank: int, dp_rank: int) -> list[dict[str, torch.Tensor]]:
        """The flat groups of a rank by kind, mapped; anew now and then, so that what was read does not pile up."""
        if self._read > MAPPED and not self.unsafe:  # code that a file holds runs as seldom as can be
            self._mapped.clear()
            self._read = 0
        if (tp_rank, dp_rank) not in self._mapped:
            state = self._state(self._optims[tp_rank, dp_rank], checked=True)
            moments = state["moments"]
            self._mapped[tp_rank, dp_rank] = [
                {FP32: flat} | {kind: moments[number][kind].detach() for kind in MOMENTS if moments}
                for number, flat in enumerate(state["groups"])
            ]
        return self._mapped[tp_rank, dp_rank]
