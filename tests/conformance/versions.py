"""Both versions of transformers as the tests see them: each a process of its own, asked through a pipe.

Of make() the folder then holds a model noisy in every parameter; load() has seen that the loading report is empty:

    inputs = {"input_ids": ids, "labels": labels}
    made = reference("4.56.2").make(folder, "XLMRobertaForMaskedLM", config, inputs, grads=True)
    made.tensors["logits"], made.grads["lm_head.bias"]
    reference("5.23.0").load(our_folder, "XLMRobertaForMaskedLM", inputs).tensors["loss"]
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

REPO = Path(__file__).parents[2]
OLD, NEW = "4.56.2", "5.23.0"
VERSIONS = (OLD, NEW)
both_versions = pytest.mark.parametrize("version", VERSIONS)

Inputs = Mapping[str, Any]
"""Arguments of one call by name: tensors, and whatever JSON has (output_attentions=True)."""


def python_of(version: str) -> Path:
    """The interpreter that has a version; the test is skipped where nobody made the second environment."""
    if version == NEW:
        return Path(sys.executable)
    folder = REPO / os.environ.get("XLSCALE_VENV_456", ".venv-4.56")
    if not (folder / "bin/python").exists():
        pytest.skip(
            f"no transformers {OLD}: {folder} does not exist; `make test` makes it, "
            "or XLSCALE_VENV_456 names an environment that has it"
        )
    return folder / "bin/python"


@dataclass
class Outputs:
    """What a model of the reference gave."""

    calls: list[dict[str, Tensor]]
    """Of each call every tensor by its dotted name: "loss", "logits", "hidden_states.0", "past_key_values.0.1"."""
    grads: dict[str, Tensor]
    """Of the last call's loss by the reference's name, a tied parameter under all of its names; {} unless asked for."""
    report: dict[str, list[str]]
    """Of from_pretrained(output_loading_info=True); {} after make()."""
    info: dict[str, Any]
    """After load(): "class", "dtype" and "config" of the model."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the only call."""
        assert len(self.calls) == 1
        return self.calls[0]


class ReferenceFailedError(AssertionError):
    """The reference raised; the message is its traceback."""


class Reference:
    """A process with one version of transformers; it starts at the first question and answers them in turn."""

    def __init__(self, version: str):
        self.version = version
        self._process: subprocess.Popen[str] | None = None

    def make(
        self,
        folder: str | Path,
        kind: str,
        config: Inputs,
        inputs: Inputs | Sequence[Inputs] = (),
        *,
        grads: bool = False,
        seed: int = 0,
        noise: float = 0.2,
        dtype: str = "float32",
        options: Inputs | None = None,
        save: Inputs | None = None,
        before: Sequence[Sequence[Any]] = (),
    ) -> Outputs:
        """A new model of class `kind`, every parameter noisy, in eval mode: saved in `folder`, and called.

        config: fields of its config, model_type among them. inputs: of one call, or of several in turn (then
        "past_key_values": True hands on the cache of the call before). options: for the constructor, as
        {"attn_implementation": "eager"}. save: for save_pretrained. before: methods called first, [name, *arguments].
        """
        args = {"folder": str(folder), "kind": kind, "config": dict(config), "seed": seed, "noise": noise}
        args |= {"dtype": dtype, "save": dict(save or {})}
        return self._call_model("make", args, inputs, grads, options, before)

    def load(
        self,
        folder: str | Path,
        kind: str,
        inputs: Inputs | Sequence[Inputs] = (),
        *,
        grads: bool = False,
        options: Inputs | None = None,
        before: Sequence[Sequence[Any]] = (),
        clean: bool = True,
    ) -> Outputs:
        """A model from a folder, called as in make(); unless clean=False the loading report must be empty."""
        outputs = self._call_model("load", {"folder": str(folder), "kind": kind}, inputs, grads, options, before)
        assert not clean or not any(outputs.report.values()), f"transformers {self.version}: {outputs.report}"
        return outputs

    def parameters(self, kind: str, config: Inputs) -> dict[str, tuple[int, ...]]:
        """Names and shapes of everything in a model's state, tied tensors under both names."""
        found = self.ask("parameters", kind=kind, config=dict(config))
        return {name: tuple(shape) for name, shape in found.items()}

    def generate(
        self,
        folder: str | Path,
        kind: str,
        inputs: Mapping[str, Tensor],
        options: Inputs | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """Greedy continuation of prompts, the prompts first; settings as for transformers' generate."""
        args = {"folder": str(folder), "kind": kind, "settings": settings, "options": dict(options or {})}
        with tempfile.TemporaryDirectory() as out:
            save_file(dict(inputs), f"{out}/inputs0.safetensors")
            found: list[list[int]] = self.ask("generate", out=out, **args)
        return found

    def encode(
        self,
        folder: str | Path,
        texts: Sequence[Any],
        kind: str = "AutoTokenizer",
        options: Inputs | None = None,
        **call: Any,
    ) -> list[list[int]]:
        """Ids of each text, or of each [text, text], with the template unless add_special_tokens=False."""
        args = {"folder": str(folder), "kind": kind, "texts": list(texts), "options": dict(options or {}), "call": call}
        found: list[list[int]] = self.ask("encode", **args)
        return found

    def ask(self, op: str, out: str = "", **args: Any) -> Any:
        """The answer of one of the functions in reference.py; ReferenceFailedError with its traceback if it raised."""
        if self._process is None:
            self._process = self._started()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"op": op, "args": args, "out": out}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"transformers {self.version} died with {self._process.wait()}; its last words are above"
        answer = json.loads(line)
        if "error" in answer:
            raise ReferenceFailedError(f"transformers {self.version}:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        command = [str(python_of(self.version)), "-P", str(Path(__file__).with_name("reference.py"))]
        # Nothing of our environment may be imported over there.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )
        self._process = process
        found = self.ask("versions")["transformers"]
        assert found == self.version, f"{command[0]} has transformers {found}, not {self.version}"
        return process

    def _call_model(
        self,
        op: str,
        args: dict[str, Any],
        inputs: Inputs | Sequence[Inputs],
        grads: bool,
        options: Inputs | None,
        before: Sequence[Sequence[Any]],
    ) -> Outputs:
        calls = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        plain = [{k: v for k, v in call.items() if not isinstance(v, Tensor)} for call in calls]
        args |= {
            "calls": plain,
            "grads": grads,
            "options": dict(options or {}),
            "before": [list(step) for step in before],
        }
        with tempfile.TemporaryDirectory() as out:
            for number, call in enumerate(calls):
                tensors = {k: v.detach().clone().contiguous() for k, v in call.items() if isinstance(v, Tensor)}
                save_file(tensors, f"{out}/inputs{number}.safetensors")
            info = self.ask(op, out=out, **args) or {}
            outputs = [load_file(f"{out}/outputs{number}.safetensors") for number in range(len(calls))]
            gradients = load_file(f"{out}/grads.safetensors") if grads else {}
        return Outputs(outputs, gradients, info.pop("report", {}), info)
