"""The reference's side of a comparison: run by the python of some version of transformers, it knows nothing of ours.

A request is a line of JSON on stdin, {"op": one of OPS, "args": {...}, "out": a folder}; the answer is a line on
stdout, {"result": ...} or {"error": traceback}. Tensors go through safetensors files in the folder.
tests/conformance/versions.py is the other end.
"""

import json
import os
import sys
import traceback
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Before the imports: what they print must not get between the answers.
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def new_model(kind, config, seed, noise, options):
    """A model with every parameter noisy: biases, norms and padding rows too."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**config)
    # The automatic classes take the implementation of attention here, in both versions.
    auto = getattr(transformers, kind)
    model = (
        auto._from_config(config, **options) if hasattr(auto, "_from_config") else auto.from_config(config, **options)
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model.eval()


def flat(name, value, into):
    """Every tensor of an output under a dotted name: "logits", "hidden_states.0", "past_key_values.1.0"."""
    if isinstance(value, torch.Tensor):
        into[name] = value.detach().clone().contiguous()
    elif hasattr(value, "self_attention_cache"):
        pairs = zip(cached(value.self_attention_cache), cached(value.cross_attention_cache), strict=False)
        flat(name, [(*own, *cross) for own, cross in pairs], into)
    elif hasattr(value, "layers"):
        flat(name, cached(value), into)
    elif isinstance(value, dict):
        for key, part in value.items():
            flat(f"{name}.{key}" if name else key, part, into)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            flat(f"{name}.{index}", part, into)
    elif value is not None:
        raise TypeError(f"{name} is a {type(value)}")


def cached(cache):
    """(keys, values) of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None]


def called(model, before, calls, grads, out):
    """Run `calls` one after the other; a call with "past_key_values": true gets the cache of the one before."""
    for step in before:
        getattr(model, step[0])(*step[1:])
    cache = None
    for number, call in enumerate(calls):
        inputs = {**load_file(f"{out}/inputs{number}.safetensors"), **call}
        if inputs.get("past_key_values"):
            inputs["past_key_values"] = cache
        with torch.set_grad_enabled(grads):
            output = model(**inputs)
        cache = output.get("past_key_values")
        tensors = {}
        flat("", dict(output), tensors)
        save_file(tensors, f"{out}/outputs{number}.safetensors")
    if grads:
        output.loss.backward()
        # A tied one under each of its names: which of them comes first depends on the version.
        every = model.named_parameters(remove_duplicate=False)
        found = {name: p.grad.clone().contiguous() for name, p in every if p.grad is not None}
        save_file(found, f"{out}/grads.safetensors")


def versions(args, out):
    import sentencepiece
    import tokenizers

    return {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, sentencepiece)}


def make(args, out):
    """A new noisy model: saved in args["folder"], and called."""
    model = new_model(args["kind"], args["config"], args["seed"], args["noise"], args["options"])
    model.to(getattr(torch, args["dtype"]))
    model.save_pretrained(args["folder"], **args["save"])
    called(model, args["before"], args["calls"], args["grads"], out)


def load(args, out):
    """A model from args["folder"], called; the result is what from_pretrained reported."""
    kind = getattr(transformers, args["kind"])
    model, report = kind.from_pretrained(args["folder"], output_loading_info=True, **args["options"])
    called(model.eval(), args["before"], args["calls"], args["grads"], out)
    report = {key: [str(item) for item in value] for key, value in report.items()}
    return {
        "report": report,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "config": model.config.to_dict(),
    }


def parameters(args, out):
    """Names and shapes of a class's state on the meta device: of every size, without memory."""
    kind, config = getattr(transformers, args["kind"]), transformers.AutoConfig.for_model(**args["config"])
    with torch.device("meta"):
        model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def config(args, out):
    """config.json as this version reads it from a folder and would write it."""
    return transformers.AutoConfig.from_pretrained(args["folder"]).to_dict()


def generate(args, out):
    """Greedy tokens, prompt and all."""
    kind = getattr(transformers, args["kind"])
    model = kind.from_pretrained(args["folder"], **args["options"]).eval()
    ids = model.generate(**load_file(f"{out}/inputs0.safetensors"), do_sample=False, **args["settings"])
    return ids.tolist()


def tokenizer_of(args):
    return getattr(transformers, args["kind"]).from_pretrained(args["folder"], **args["options"])


def encode(args, out):
    """What the tokenizer makes of each text, or of each [text, text], with its template unless told not to."""
    tokenizer = tokenizer_of(args)
    texts = [text if isinstance(text, list) else [text] for text in args["texts"]]
    return [list(tokenizer(*text, **args["call"])["input_ids"]) for text in texts]


def tokenizer_calls(args, out):
    """Methods or attributes of the tokenizer: [name, *arguments] each; {"missing": true} for what it has not."""
    tokenizer, found = tokenizer_of(args), []
    for name, *given in args["calls"]:
        value = getattr(tokenizer, name, {"missing": True})
        found.append(value(*given) if callable(value) else value)
    return found


OPS = (versions, make, load, parameters, config, generate, encode, tokenizer_calls)


def main():
    ops = {op.__name__: op for op in OPS}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": ops[request["op"]](request["args"], request["out"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer, default=str), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
