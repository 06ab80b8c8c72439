"""report.html: what a run did, on one page that needs nothing but itself; what is not there is said."""

import importlib.metadata
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from xlscale.charts import Mark, Point, Series, line_chart, smooth
from xlscale.data.shards import write_atomically
from xlscale.page import absent, bar, cell, head, table, tiles, whole_page
from xlscale.report_data import corpus, damaged, languages
from xlscale.run_folder import Run, read_run
from xlscale.training.metrics import short

PACKAGES = ("torch", "deepspeed", "fairscale", "safetensors", "sentencepiece")
EVENTS_SHOWN = 200


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html from the run folder and the corpus's report.json; returns its path.

    Raises FileNotFoundError where there is no run, ValueError where a file of it is broken.
    """
    run = read_run(run_dir)
    out = run_dir / "report.html"
    write_atomically(out, page(run).encode())
    return out


def page(run: Run) -> str:
    """The whole document."""
    sections = (header, losses, speed, languages, damaged, corpus, predictions, history, facts)
    body = "".join(section(run) for section in sections)
    return whole_page(run.name, body, f", {_when(time.time())}")


def header(run: Run) -> str:
    """Name, state, and the figures that one looks for first."""
    last = run.records[-1] if run.records else {}
    step = last.get("step", 0)
    done = step >= run.total_steps > 0
    state = f"{'finished' if done else 'at'} {step:,} of {run.total_steps:,} updates"
    tail = max(1, len(run.records) // 20)
    seconds = sum(record.get("step_seconds") or 0.0 for record in run.records)
    resumes = sum(event["event"] == "resume" for event in run.events)
    speeds = [v for _, v in run.points("tokens_per_second") if v]
    figures = [
        ("loss", _mean(run, "loss", tail, "{:.3f}"), f"mean of the last {tail} updates"),
        ("masked accuracy", _mean(run, "masked_accuracy", tail, "{:.1%}"), "of the same updates"),
        ("tokens", short(sum(record.get("tokens") or 0 for record in run.records)), "seen in training"),
        ("throughput", short(statistics.median(speeds)) if speeds else "-", "tokens per second, median"),
        ("time in updates", _duration(seconds), f"{resumes} resumes" if resumes != 1 else "1 resume"),
        ("skipped updates", str(last.get("skipped_updates", 0)), "not finite, or a spike"),
        *_saves(run),
    ]
    return f'<h1>{_t(run.name)}</h1><span class="state {"done" if done else "part"}">{state}</span>{tiles(figures)}'


def _saves(run: Run) -> list[tuple[str, str, str]]:
    """For how long a checkpoint holds the training, where there is one."""
    saves = [event for event in run.events if event["event"] == "checkpoint" and "held_seconds" in event]
    if not saves:
        return []
    held, written = (statistics.median(save[key] for save in saves) for key in ("held_seconds", "written_seconds"))
    told = f"for a checkpoint, median of {len(saves):,}; written in {written:.3g} s"
    return [("training held", f"{held:.3g} s", told)]


def losses(run: Run) -> str:
    """Loss and masked accuracy, with resumes and checkpoints on the time line."""
    raw = run.points("loss")
    window = max(5, len(raw) // 40)
    marks = [Mark(e["step"], f"resumed at {e['step']:,}", "resume") for e in run.events if e["event"] == "resume"]
    marks += [
        Mark(e["step"], f"{e['event']} at {e['step']:,}", e["event"])
        for e in run.events
        if e["event"] in ("checkpoint", "export", "skip")
    ]
    mean = f"mean of {window // 2 * 2 + 1} updates"
    accuracy = run.points("masked_accuracy")
    return (
        head(
            "Loss",
            "Cross entropy of the masked tokens, in nats. Triangles are checkpoints, dashed lines resumes.",
        )
        + line_chart(
            "Loss, all languages",
            [Series("each update", raw, "raw"), Series(mean, smooth(raw, window))],
            _decimal,
            marks=marks,
            width=1080,
            height=320,
        )
        + '<div class="pair">'
        + line_chart("Masked tokens guessed right", _with_mean(accuracy, window), "{:.0%}".format, zero=True)
        + line_chart("Learning rate", [Series("learning rate", run.points("learning_rate"))], _rate, zero=True)
        + "</div>"
    )


def speed(run: Run) -> str:
    """Throughput, gradient norm, and where the time of an update goes."""
    window = max(5, len(run.records) // 40)
    norms = run.points("grad_norm")
    finite = sorted(value for _, value in norms if value is not None)
    # A few spikes must not flatten the rest.
    top = 3.0 * finite[int(0.98 * (len(finite) - 1))] if finite else None
    waits = [(r["step"], r["data_seconds"]) if "data_seconds" in r else (r["step"], None) for r in run.records]
    return (
        head("Speed and gradient", "Over all processes.")
        + '<div class="pair">'
        + line_chart("Tokens per second", _with_mean(run.points("tokens_per_second"), window), short, zero=True)
        + line_chart("Gradient norm", [Series("each update", norms)], _decimal, zero=True, top=top)
        + line_chart(
            "Seconds of an update",
            [Series("whole update", run.points("step_seconds")), Series("waiting for data", waits, "second")],
            _decimal,
            zero=True,
        )
        + line_chart("Memory, GiB per process", [Series("peak", run.points("memory_gib"))], _decimal, zero=True)
        + "</div>"
    )


def predictions(run: Run) -> str:
    """Masks filled by the exported model, against the baseline of the language's most frequent token."""
    found = run.predictions
    if not found:
        return ""
    rows = []
    for code, row in sorted((found.get("per_language") or {}).items()):
        right, base = row.get("accuracy") or 0.0, row.get("baseline") or 0.0
        both = bar(right) + bar(base, "second")
        rows.append(
            cell(code)
            + cell(f"{row.get('n', 0):,}", row.get("n", 0))
            + f'<td data-value="{right}" class="n {"better" if right > base else "worse"}">{right:.1%}</td>'
            + cell(f"{base:.1%}", base)
            + f'<td class="barred" data-value="{right - base}">{both}</td>'
        )
    examples = "".join(_example(example) for example in found.get("examples") or [])
    heads = ["language", "masks", "right", "baseline", "right / baseline"]
    told = (
        f"The exported folder <code>{_t(found.get('model', ''))}</code>, loaded by transformers, on held-out "
        f"sentences: {found.get('accuracy') or 0.0:.1%} right; the unigram baseline "
        f"{found.get('baseline_accuracy') or 0.0:.1%}. Bars: blue is the model, orange the baseline."
    )
    return (
        head("Filled masks", told)
        + (table(heads, rows, sortable=True, numbers={1, 2, 3}) if rows else "")
        + f'<div class="examples">{examples}</div>'
    )


def _example(example: Mapping[str, Any]) -> str:
    answer = _piece(example.get("answer", ""))
    text = _t(example.get("text", "")).replace("&lt;mask&gt;", f"<mark>{_t(answer) or '?'}</mark>")
    guesses = "".join(
        f'<div class="guess{" hit" if _piece(token) == answer else ""}"><b dir="auto">{_t(_piece(token))}</b>'
        f"<div>{bar(probability)}</div><span>{probability:.0%}</span></div>"
        for token, probability in example.get("top") or []
    )
    return (
        f'<div class="example"><small>{_t(example.get("language", ""))}</small><p dir="auto">{text}</p>{guesses}</div>'
    )


def history(run: Run) -> str:
    """Starts, resumes, checkpoints, exports and faults, the latest last."""
    shown = run.events[-EVENTS_SHOWN:]
    if not shown:
        return absent("History", "The run has no events.")
    rows = []
    for event in shown:
        details = {k: v for k, v in event.items() if k not in ("time", "step", "event") and not isinstance(v, dict)}
        told = ", ".join(f"{key} {value}" for key, value in details.items())
        rows.append(
            cell(_when(event["time"])) + cell(f"{event['step']:,}", event["step"]) + cell(event["event"])
            + f'<td class="wrap">{_t(told)}</td>'
        )  # fmt: skip
    more = f" The latest {EVENTS_SHOWN} of {len(run.events):,}." if len(run.events) > len(shown) else ""
    counts = ", ".join(f"{_t(name)} {n}" for name, n in Counter(e["event"] for e in run.events).most_common())
    heads = ["time (UTC)", "step", "event", "details"]
    return head("History", f"{counts}.{more}") + table(heads, rows, numbers={1})


def facts(run: Run) -> str:
    """Topology, model, versions, and the resolved config."""
    last = run.records[-1] if run.records else {}
    model = run.config.get("model", {})
    training = run.config.get("training", {})
    versions = run.told("versions")
    here = {name: _version(name) for name in PACKAGES}
    pairs = {
        "processes": f"{last.get('dp', '?')} data-parallel x {last.get('tp', '?')} tensor-parallel, "
        f"{last.get('accumulation', '?')} micro-steps per update",
        "batch": f"{training.get('global_batch_size', '?')} sequences of "
        f"{run.config.get('data', {}).get('sequence_length', '?')} tokens, {training.get('precision', '?')}",
        "model": f"{model.get('model_type', '?')}: {model.get('num_hidden_layers', '?')} layers, hidden size "
        f"{model.get('hidden_size', '?')}, {model.get('num_attention_heads', '?')} heads, "
        f"{model.get('vocab_size', '?')} word embeddings",
        "versions" if versions else "versions here, now": ", ".join(
            f"{name} {version}" for name, version in (versions or here).items()
        ),
    }
    listed = "".join(f"<dt>{_t(name)}</dt><dd>{_t(value)}</dd>" for name, value in pairs.items())
    config = f"<details><summary>config.toml, resolved</summary><pre>{_t(run.config_text)}</pre></details>"
    return head("Facts") + f'<div class="card"><dl>{listed}</dl></div>{config if run.config_text else ""}'


def _with_mean(points: list[Point], window: int) -> list[Series]:
    return [Series("each update", points, "raw"), Series("mean", smooth(points, window))]


def _mean(run: Run, key: str, tail: int, form: str) -> str:
    values = [value for _, value in run.points(key)[-tail:] if value is not None]
    return form.format(statistics.fmean(values)) if values else "-"


_decimal: Callable[[float], str] = lambda value: f"{value:.3g}"  # noqa: E731
_rate: Callable[[float], str] = lambda value: "0" if value == 0 else f"{value:.1e}"  # noqa: E731


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _piece(token: Any) -> str:
    """A piece as a person reads it: without SentencePiece's mark of a word's beginning."""
    return str(token).replace("\u2581", " ").strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _t(value: Any) -> str:
    return escape(str(value))
