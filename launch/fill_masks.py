"""Loads a Hub folder with transformers and fills masks on held-out documents; writes predictions.json for the report.

Arguments: the Hub folder, the run's folder. Every number is on text that training never saw.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer

from xlscale.config import load_config
from xlscale.data.stream import Stream, open_stream
from xlscale.tokenizer import FIRST_PIECE

MASKED = 0.15
SHORTEST = 16
"""Pieces that a held-out window must have, to give any context."""
WINDOWS = 60
"""Windows of held-out text per language, at most; each as long as the model takes."""
EXAMPLES = 2


def pieces_of(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def unigram(stream: Stream, language: str) -> np.ndarray:
    """How often each piece stands in a language's training text; the special tokens, which come first, do not count."""
    counts = np.zeros(stream.vocab_size, np.int64)
    for number in range(stream.tokens.chunks(language)):
        counts += np.bincount(stream.tokens.chunk(language, number).ids, minlength=stream.vocab_size)
    counts[:FIRST_PIECE] = 0
    return counts


def held_out_windows(tokenizer: Any, path: Path) -> list[list[int]]:
    """Windows of ids, with room for <s> and </s>, from the held-out documents of one language."""
    windows = []
    length = tokenizer.model_max_length - 2
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = pieces_of(tokenizer, json.loads(line)["text"])
        windows += [ids[i : i + length] for i in range(0, len(ids), length)]
    return [window for window in windows if len(window) >= SHORTEST][:WINDOWS]


def evaluate(model: Any, tokenizer: Any, windows: list[list[int]], counts: np.ndarray, rng: Any) -> dict[str, Any]:
    """Accuracy and loss (nats per masked piece) of the model, and of always guessing by the unigram counts."""
    # Add-one smoothing: a piece that training never had in this language still has a chance.
    chances = (counts + 1) / (counts + 1).sum()
    guess = int(counts.argmax())
    sums: dict[str, float] = dict.fromkeys(("n", "right", "guessed", "loss", "unigram_loss"), 0.0)
    examples: list[dict[str, Any]] = []
    for window in windows:
        ids = torch.tensor([[tokenizer.bos_token_id, *window, tokenizer.eos_token_id]])
        chosen = 1 + np.flatnonzero(rng.random(len(window)) < MASKED)
        if not len(chosen):
            continue
        answers = ids[0, chosen]
        masked = ids.clone()
        masked[0, chosen] = tokenizer.mask_token_id
        with torch.inference_mode():
            log_probs = model(input_ids=masked).logits[0, chosen].float().log_softmax(-1)
        best = log_probs.argmax(-1)
        sums["n"] += len(chosen)
        sums["right"] += int((best == answers).sum())
        sums["guessed"] += int((answers == guess).sum())
        sums["loss"] -= float(log_probs.gather(1, answers[:, None]).sum())
        sums["unigram_loss"] -= float(np.log(chances[answers.numpy()]).sum())
        if len(examples) < EXAMPLES:
            examples.append(example(tokenizer, model, ids, most_readable(tokenizer, ids[0], chosen)))
    n = sums["n"]
    return {
        "accuracy": sums["right"] / n,
        "baseline": sums["guessed"] / n,
        "loss": sums["loss"] / n,
        "baseline_loss": sums["unigram_loss"] / n,
        "n": int(n),
        "examples": examples,
    }


def most_readable(tokenizer: Any, ids: torch.Tensor, positions: np.ndarray) -> int:
    """Of some positions the one with the longest start of a word: a person can judge it best."""
    tokens = tokenizer.convert_ids_to_tokens(ids[positions].tolist())
    lengths = [len(token) if token.startswith("▁") and token[1:].isalpha() else 0 for token in tokens]
    return int(positions[int(np.argmax(lengths))])


def example(tokenizer: Any, model: Any, ids: torch.Tensor, position: int) -> dict[str, Any]:
    """One piece masked alone, with what the model thinks of it."""
    masked = ids.clone()
    masked[0, position] = tokenizer.mask_token_id
    with torch.inference_mode():
        top = model(input_ids=masked).logits[0, position].float().softmax(-1).topk(5)
    low, high = max(1, position - 16), min(ids.shape[1] - 1, position + 17)
    return {
        "text": tokenizer.decode(masked[0, low:high]),
        "answer": tokenizer.convert_ids_to_tokens(int(ids[0, position])),
        "top": [[tokenizer.convert_ids_to_tokens(int(i)), float(p)] for p, i in zip(*top, strict=True)],
    }


def main(hub_folder: str, run_dir: str) -> None:
    """Evaluate every language, print a table, write predictions.json; fail if the model is no better than counting."""
    config = load_config(Path(run_dir) / "config.toml")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # for a window at a time of so small a model more only wait for each other
    tokenizer = AutoTokenizer.from_pretrained(hub_folder)
    model, loading = AutoModelForMaskedLM.from_pretrained(hub_folder, output_loading_info=True)
    problems = {key: sorted(map(str, found)) for key, found in loading.items() if found}
    if problems:
        sys.exit(f"transformers did not load {hub_folder} cleanly: {problems}")
    model.eval()
    print(f"   {type(model).__name__} from {hub_folder}: no key missing, none unexpected")
    stream = open_stream(config)
    results, examples = {}, []
    for language in stream.languages:
        path = Path(config.data.shards).parent / "heldout" / f"{language}.jsonl"
        windows = held_out_windows(tokenizer, path) if path.exists() else []
        if not windows:
            print(f"   {language}: no held-out text of {SHORTEST} pieces or more; left out")
            continue
        found = evaluate(model, tokenizer, windows, unigram(stream, language), np.random.default_rng(0))
        examples += [{"language": language, **shown} for shown in found.pop("examples")]
        results[language] = found
    n = sum(result["n"] for result in results.values())
    mean = {
        key: sum(result[key] * result["n"] for result in results.values()) / n
        for key in ("accuracy", "baseline", "loss", "baseline_loss")
    }
    show({**results, "all": {**mean, "n": n}})
    for shown in examples[:: max(1, len(examples) // 6)]:
        guesses = ", ".join(f"{piece} {p:.0%}" for piece, p in shown["top"][:3])
        print(f"   [{shown['language']}] {shown['text']}\n      -> {guesses}   (it was {shown['answer']})")
    predictions = {
        "model": hub_folder,
        "accuracy": mean["accuracy"],
        "baseline_accuracy": mean["baseline"],
        "loss": mean["loss"],
        "baseline_loss": mean["baseline_loss"],
        "per_language": results,
        "examples": examples,
    }
    (Path(run_dir) / "predictions.json").write_text(
        json.dumps(predictions, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    if mean["accuracy"] <= mean["baseline"] or mean["loss"] >= mean["baseline_loss"]:
        sys.exit("the model fills masks no better than the unigram baseline on held-out text")


def show(rows: dict[str, dict[str, Any]]) -> None:
    """A table: held-out masked pieces filled right, and the loss, beside always guessing by frequency."""
    print("   held-out   pieces   filled right   unigram   loss   unigram")
    for name, row in rows.items():
        print(
            f"   {name:8s} {row['n']:8d}   {row['accuracy']:11.1%} {row['baseline']:9.1%}"
            f" {row['loss']:6.2f} {row['baseline_loss']:9.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
