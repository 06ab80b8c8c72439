"""The model card, README.md of a Hub folder: what was trained on what, how far, and how well it predicts each language.

What it tells of a config may be public: folders of this machine are told by their last part, URLs without credentials.
"""

import hashlib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from xlscale.checkpoint.store import Checkpoint
from xlscale.config import to_toml
from xlscale.config_sections import Config
from xlscale.config_values import toml_value

CARD = "README.md"
METRICS = "metrics.jsonl"
UPDATES = 100
"""Losses are means over so many updates, the last ones that the folder's weights have seen."""
BLOCK = 1 << 20
MARK = re.compile(r"<!-- xlscale ([0-9a-f]{64}) -->\n\Z")


def marked(card: str) -> str:
    """A card with its digest at the end, by which one that nobody has edited is known."""
    return f"{card}<!-- xlscale {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_marked(path: Path) -> bool:
    """Whether a file is a card as we wrote it, so that it may be replaced."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    mark = MARK.search(text)
    return mark is not None and marked(text[: mark.start()]) == text


def checkpoint_card(checkpoint: Checkpoint, config: Config, dtype: str) -> str:
    """The card of a checkpoint that lies in its run's folder, or without losses, of one that lies elsewhere."""
    records = last_records(checkpoint.folder.parent.parent / METRICS, checkpoint.step)
    return model_card(checkpoint.manifest, checkpoint.state("stream"), config, records, dtype)


def model_card(
    manifest: dict[str, Any], stream: dict[str, Any], config: Config, records: list[dict[str, Any]], dtype: str
) -> str:
    """Markdown, with the header that the Hub reads.

    manifest, stream: of the checkpoint. records: the metrics of its last updates, see last_records.
    """
    losses, tokens = _means(records)
    languages = stream.get("languages") or sorted(losses)
    return "\n".join(
        [
            *header(config.model.model_type, languages),
            f"# {config.run.name}",
            "",
            _summary(manifest, config, len(languages), dtype),
            "",
            "## Training",
            "",
            *_table(("fact", "value"), _training(manifest, config)),
            "",
            "## Data",
            "",
            *_table(("fact", "value"), _data(stream, config)),
            "",
            "## Losses per language",
            "",
            *_losses(languages, losses, tokens, records),
            "",
            "## Config",
            "",
            "```toml",
            public_toml(config),
            "```",
            "",
        ]
    )


def public_toml(config: Config) -> str:
    """The resolved config, fit for the public."""
    lines = []
    for section, values in tomllib.loads(to_toml(config)).items():
        lines += ["", f"[{section}]", *(f"{key} = {toml_value(_public(value))}" for key, value in values.items())]
    return "\n".join(lines[1:])


def _public(value: Any) -> Any:
    """A value with every absolute path cut to its last part, and every URL to scheme, host and path."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        scheme, host, path, *_ = urlsplit(value)
        return urlunsplit((scheme, host.rpartition("@")[2], path, "", ""))
    return Path(value).name if value.startswith(("/", "~")) else value


def header(model_type: str, languages: Sequence[str]) -> list[str]:
    """What the Hub reads on top of a card."""
    # Quoted, for no alone is false in YAML.
    codes = dict.fromkeys(code.split("_")[0] for code in languages)
    return [
        "---",
        *(["language:", *(f'- "{code}"' for code in codes)] if codes else []),
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "tags:",
        f'- "{model_type}"',
        '- "xlscale"',
        "---",
        "",
    ]


def _summary(manifest: dict[str, Any], config: Config, languages: int, dtype: str) -> str:
    count = sum(math.prod(entry["shape"]) for entry in manifest["parameters"].values())
    return (
        f"Masked language model of the family {config.model.model_type}: {count:,} parameters, {languages} languages, "
        f"{manifest['step']:,} of {config.training.total_steps:,} updates, weights in {dtype}. Pretrained and exported "
        "by xlscale; this card says what the run's own records say, and nothing that they do not."
    )


def _training(manifest: dict[str, Any], config: Config) -> dict[str, Any]:
    training, model, optimizer, shape = config.training, config.model, config.optimizer, manifest["topology"]
    return {
        "updates": f"{manifest['step']:,} of {training.total_steps:,}",
        "samples": f"{manifest['slot']:,} of {config.data.sequence_length} tokens, "
        f"{training.global_batch_size:,} an update",
        "model": f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.intermediate_size} inside, {model.vocab_size:,} pieces",
        "started from": _public(training.init_from) or f"seed {training.seed}",
        "precision": f"{training.precision}, weights and moments fp32",
        "optimizer": f"AdamW, {optimizer.learning_rate:g} at its peak, betas {optimizer.betas}, eps {optimizer.eps:g}, "
        f"weight decay {optimizer.weight_decay:g}",
        "schedule": f"{config.schedule.warmup_steps:,} updates of warm-up, then {config.schedule.decay}",
        "masking": f"{config.masking.mlm_probability:.0%} of the tokens, by {config.masking.unit}",
        "last run at": f"dp {shape['dp']} x tp {shape['tp']}, ZeRO stage {shape['zero_stage']}",
        "versions": ", ".join(f"{name} {number}" for name, number in manifest["versions"].items()),
    }


def _data(stream: dict[str, Any], config: Config) -> dict[str, Any]:
    data = config.data
    weighed = "language_weights" if data.language_weights else f"n_{data.sampling_over} ** {data.sampling_alpha:g}"
    return {
        "shards": _public(data.shards),
        "corpus": f"`{stream['corpus']}`" if "corpus" in stream else "not recorded",
        "tokenizer": _public(data.tokenizer) + (f" `{stream['tokenizer']}`" if "tokenizer" in stream else ""),
        "languages": len(stream.get("languages", [])) or "not recorded",
        "sampling": f"p(language) ~ {weighed}" + (f", {len(data.phases)} later phases" if data.phases else ""),
        "packing": data.packing,
    }


def _losses(
    languages: list[str], losses: dict[str, float], tokens: Counter[str], records: list[dict[str, Any]]
) -> Iterator[str]:
    if not losses:
        yield "Not recorded: the checkpoint was exported without the metrics of its run."
        return
    told = [record["loss"] for record in records if record.get("loss") is not None]
    yield (
        f"Mean cross-entropy of the masked training tokens over updates {records[0]['step']:,} to "
        f"{records[-1]['step']:,}: {math.fsum(told) / max(len(told), 1):.4f}. It is no held-out measure."
    )
    yield ""
    rows = {
        code: (f"{losses[code]:.4f}" if code in losses else "-", f"{tokens[code] / max(tokens.total(), 1):.2%}")
        for code in languages
    }
    yield from _table(("language", "loss", "share of tokens"), rows)


def _table(heads: tuple[str, ...], rows: dict[str, Any]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for name, values in rows.items():
        cells = [str(value).replace("|", "\\|") for value in (values if isinstance(values, tuple) else (values,))]
        yield f"| {name} | {' | '.join(cells)} |"


def _means(records: list[dict[str, Any]]) -> tuple[dict[str, float], Counter[str]]:
    """Language -> mean loss over the updates that had it, and its tokens in all of them."""
    found: dict[str, list[float]] = {}
    tokens: Counter[str] = Counter()
    for record in records:
        tokens.update(record.get("tokens_per_language") or {})
        for code, loss in (record.get("loss_per_language") or {}).items():
            if loss is not None:
                found.setdefault(code, []).append(loss)
    return {code: math.fsum(values) / len(values) for code, values in found.items()}, tokens


def last_records(path: Path, step: int, count: int = UPDATES) -> list[dict[str, Any]]:
    """The last `count` records of a metrics.jsonl up to `step`, in order; only its end is read."""
    found: list[dict[str, Any]] = []
    for line in _lines_backwards(path):
        try:
            record = json.loads(line)
        except ValueError:  # a last line that is cut short
            continue
        if record["step"] <= step:
            found.append(record)
        if len(found) == count:
            break
    return found[::-1]


def _lines_backwards(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        at, rest = file.seek(0, 2), b""
        while at:
            size = min(BLOCK, at)
            at -= size
            file.seek(at)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest
