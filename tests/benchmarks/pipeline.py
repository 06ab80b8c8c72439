"""Documents per second and core: each step, the whole chain, and beside it plain datatrove on the same archives.

`python -m tests.benchmarks.pipeline [TURNS [ARCHIVES]]` takes the crawl of tests/crawl.py. A turn takes so many of its
archives, and runs in new processes the demo's whole chain (read to verified shards), then datatrove as it comes, twice:
its WarcReader, Trafilatura, identification in a plain filter, JsonlWriter; once by pycld2 alone, the fastest there is,
once by py3langid on the whole text. It prints two tables and a JSON line.

CPU seconds, children's included: a core's, whatever else runs; starting Python and loading models are in them.
Plain datatrove needs the extra `benchmark`.
"""

import gzip
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from data_pipelines.steps.unpack import CODECS
from data_pipelines.steps.warc import members
from tests.crawl import made

RECIPE = Path("configs/data_demo.toml")
FOUND = b"WARC-Identified-Payload-Type: text/html"
OURS, PLAIN = "xlscale", ("pycld2", "py3langid")
# As a person without this project would write it.
PLAIN_CHAIN = """
import sys
import pycld2
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.writers import JsonlWriter
from py3langid.langid import MODEL_FILE, LanguageIdentifier

def by_pycld2(document):
    try:
        reliable, _, found = pycld2.detect(document.text.encode(), isPlainText=True)
    except pycld2.error:
        return False
    document.metadata["language"] = found[0][1]
    return reliable

identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

def by_py3langid(document):
    document.metadata["language"], probability = identifier.classify(document.text)
    return probability > 0.65

archives, output, name = sys.argv[1:]
known = {"pycld2": by_pycld2, "py3langid": by_py3langid}[name]
steps = [WarcReader(archives), Trafilatura(), LambdaFilter(known), JsonlWriter(output, compression=None)]
LocalPipelineExecutor(steps, logging_dir=output + "/logs").run()
"""


def cpu_seconds(command: list[str]) -> tuple[float, float]:
    """(seconds of all cores, largest MiB of one process) that a command takes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} exited {process.returncode}:\n{errors.decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def as_commoncrawl(archive: Path, copy: Path) -> None:
    """A copy whose records say what was found in them, as CommonCrawl's do.

    Where wget is silent, datatrove's reader asks libmagic, which takes every fourth of these pages for no page.
    """
    with archive.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        copy.write_bytes(
            b"".join(
                gzip.compress(bytes(member.content).replace(b"\r\n", b"\r\n" + FOUND + b"\r\n", 1), mtime=0)
                for member in members(data, CODECS[0])
            )
        )


def turn(archives: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Documents, CPU seconds and memory of both chains on the archives of a folder; ours with seconds by step."""
    ours = [sys.executable, "-m", "data_pipelines", str(RECIPE), "--set", f"read.archives=['{archives}/*.warc.gz']"]
    seconds, memory = cpu_seconds([*ours, "--set", f"run.output={folder}/ours"])
    report = json.loads((folder / "ours/report.json").read_text())
    documents = report["total"]["read"]
    steps = {f"step {row['step']}": row["seconds"] for row in report["throughput"]}
    found = {OURS: {"documents": documents, "seconds": seconds, "memory": memory, **steps}}
    for name in PLAIN:
        seconds, memory = cpu_seconds([sys.executable, "-c", PLAIN_CHAIN, str(archives), f"{folder}/{name}", name])
        kept = sum(1 for path in (folder / name).glob("*.jsonl") for _ in path.open("rb"))
        assert kept > documents / 2, f"plain datatrove wrote {kept} of {documents} documents"
        found[name] = {"documents": documents, "seconds": seconds, "memory": memory}
    return found


def main() -> None:
    turns, archives = (int(argument) for argument in [*sys.argv[1:], *("3", "2")[len(sys.argv) - 1 :]])
    crawled = sorted((made() / "warc").glob("*.warc.gz"))
    found = []
    for number in range(turns):
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "archives"
            source.mkdir()
            for place in range(number * archives, (number + 1) * archives):
                archive = crawled[place % len(crawled)]
                as_commoncrawl(archive, source / archive.name)
            found.append(turn(source, Path(name)))
    print(f"{'chain':<12}{'pages':>8}{'pages/s and core':>20}{'MiB':>8}")
    ratios = {name: [one[name]["seconds"] / one[OURS]["seconds"] for one in found] for name in PLAIN}
    for chain in (OURS, *PLAIN):
        rows = [one[chain] for one in found]
        rates = [row["documents"] / row["seconds"] for row in rows]
        pages = sum(int(row["documents"]) for row in rows)
        memory = max(row["memory"] for row in rows)
        line = f"{chain:<12}{pages:>8,}{statistics.median(rates):>20,.0f}{memory:>8,.0f}"
        if chain in ratios:
            least, most = min(ratios[chain]), max(ratios[chain])
            line += f"   ours takes 1 / {statistics.median(ratios[chain]):.2f} ({least:.2f} to {most:.2f})"
        print(line)
    print()
    steps = defaultdict(list)
    for one in found:
        for name, seconds in one[OURS].items():
            if name.startswith("step ") and seconds:
                steps[name.removeprefix("step ")].append(seconds / one[OURS]["documents"])
    print(f"{'step':<12}{'pages/s and core':>20}{'ms of a page':>16}")
    for name, each in steps.items():
        print(f"{name:<12}{1 / statistics.median(each):>20,.0f}{statistics.median(each) * 1e3:>16.3f}")
    print(json.dumps({"ratios": ratios, "turns": found}))


if __name__ == "__main__":
    main()
