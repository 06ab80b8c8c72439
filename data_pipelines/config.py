"""The recipe of a corpus: its list of steps, and one dataclass per TOML section; config_load.py reads it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipelines.config_rules import FILES, STEPS
from data_pipelines.steps.thresholds import described
from xlscale.data.shards import file_sha256


class RecipeError(ValueError):
    """What a person has to mend, one line per problem: the value, the rule and the way out."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: str
    """Folder that gets shards/, heldout/, dropped/, tokenizer/, report.html, .json; relative to where one starts."""
    executor: str = "local"
    """What runs the tasks: "local" processes, "slurm" or "ray"; the result is the same."""
    workers: int = 1
    """Tasks at work at once; the result is the same with any number."""
    task_mib: int = 256
    """MiB of text from which a task after reading is given no more to do: small languages share one."""
    sort_memory_mib: int = 256
    """Memory a process takes for documents that wait to be sorted, or for hashes in search of duplicates, which it
    reads more often with less."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    archives: list[str]
    """WARC and WET files and corpora (jsonl, parquet, txt; .gz, .zst, .xz, .lz4), patterns of them, URLs (http, s3),
    CommonCrawl's listings (*.paths.gz), or results of its index (*.cdxj, *.cdx; parquet and csv with read.format =
    "index"). A URL stands for its content: a change is not noticed."""
    archives_per_task: int = 1
    """Archives that one task reads, one after the other; the result is the same with any number."""
    max_faults: int = 3
    """Damaged places (a cut end, a broken gzip member, an unreadable record) that one archive may have."""
    max_bad_archives: float = 0.01
    """Share of the archives (one at least) that may have more damage: they are left out and named, the rest goes on."""
    max_page_bytes: int = 8_388_608
    """Pages longer than this, after unpacking, are dropped."""
    format: str = "auto"
    """Of all files: "warc" (WET too), "index" (rows that say where records are), "jsonl", "parquet", "txt" (empty lines
    between documents), "auto": by name."""
    text_field: str = "text"
    """Field of jsonl and parquet that is the text; a.b: field b of the object in field a."""
    url_field: str = "url"
    """Field that is the page's address, if it is there."""
    language_field: str = "language"
    """Field that is the language (any code of ISO 639 or BCP 47), where language_from is "field"."""
    language_from: str = "text"
    """Where the language comes from: "text": identified; "field"; "path": the file's name or folder (de.txt.xz)."""
    listing_base: str = "https://data.commoncrawl.org"
    """What stands before the paths of a listing: a URL or a folder."""
    max_archives: int = 0
    """So many archives, the first by name; 0 = all."""
    attempts: int = 6
    """How often a remote file is tried, with growing waits between."""
    blocklist: str = ""
    """File of domains and prefixes of addresses, one a line, whose pages are dropped."""
    robots: list[str] = field(default_factory=list)
    """Directives of robots tags and headers for which a page is dropped: noarchive, noindex, nofollow, ..."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    method: str = "resiliparse"
    """What finds the text in a page: "resiliparse", or "trafilatura" (cleaner text, a tenth of the speed)."""
    timeout_seconds: float = 10.0
    """A page that takes longer is dropped; Resiliparse takes about 0.4 ms for an ordinary one."""
    memory_mib: int = 1024
    """Memory that the extracting process may take; a page that needs more is dropped."""


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    mojibake: bool = True
    """Mend text that was decoded in a wrong charset (ftfy)."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    emails: bool = True
    """Put email@example.com in the place of e-mail addresses."""
    ip_addresses: bool = True
    """Put 192.0.2.1 or 2001:db8::1 in the place of public IP addresses."""


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    languages: list[str] = field(default_factory=list)
    """Codes of xlscale.languages to keep; empty = every language of XLM-R."""
    model: str = ""
    """A fastText model (GlotLID, OpenLID, lid.176) that identifies instead of py3langid and pycld2."""
    thresholds: str = ""
    """TOML file of min_probability and min_percent per language; empty = the two below for all."""
    min_probability: float = 0.95
    """py3langid's probability from which it is believed alone, where pycld2 does not know."""
    min_percent: int = 90
    """Share of a page, in percent, from which pycld2 is believed where py3langid says otherwise."""
    min_paragraph: int = 80
    """Characters from which a paragraph of a page in several languages is identified by itself."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    min_characters: int = 200
    """Shortest page, in letters; a character of Han, Kana or Hangul counts for three."""
    max_characters: int = 1_000_000
    """Longest page."""
    min_letters: float = 0.55
    """Letters, marks and digits, of all characters that are not spaces."""
    max_duplicate_lines: float = 0.30
    """Share of the text that stands in lines that were there before."""
    max_short_lines: float = 0.90
    """Share of the lines that are too short to be sentences: menus and tables."""
    max_code_lines: float = 0.40
    """Share of the text in lines with the signs of program code or markup."""
    rules: list[str] = field(default_factory=list)
    """Sets of published rules that hold besides: gopher, gopher_repetition, c4_lines, c4, mc4, fineweb."""
    thresholds: str = ""
    """Their thresholds per language: a TOML file, or a folder of FineWeb-2's; empty = those of the papers."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    models: str = ""
    """KenLM models as CCNet's, `{language}` in their path; a language without one is not looked at."""
    tokenizers: str = ""
    """SentencePiece models of the text that they were made of, `{language}` in their path."""
    cutoffs: str = ""
    """TOML file: per language `head` and `tail`, the perplexities that bound the three buckets."""
    keep: list[str] = field(default_factory=lambda: ["head", "middle"])
    """Buckets that stay: head (most like the model's text), middle, tail; a document's is in its shard."""


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    shingle: int = 7
    """Characters in a shingle, for scripts with an alphabet; of Han, Kana and Hangul it takes half as many.
    """
    bands: int = 14
    """Bands of the MinHash signature; two pages that share all hashes of one are compared."""
    rows: int = 8
    """Hashes in a band; 14 x 8 finds pages that are 80 % alike with probability .92."""
    min_similarity: float = 0.75
    """Estimated Jaccard similarity from which the later of two pages is dropped."""
    seed: int = 1
    """Key of the hash functions."""


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    fraction: float = 0.03
    """Share of a language's documents that is kept out of the shards, by a hash of their ids."""
    min_documents: int = 2
    """At least so many documents of each language, but no more than a quarter of them (or one)."""
    max_documents: int = 1000
    """At most so many documents of each language are held out."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    min_documents: int = 4
    """A language with fewer documents than this is dropped as a whole."""
    documents_per_chunk: int = 128
    """Documents in one member of a tar: what training reads and shuffles at once."""
    chunks_per_shard: int = 64
    """Members of one tar."""
    compression: str = "none"
    """Of each chunk: "none", or "zstd" (a third of the size, for archives and slow networks)."""
    part_mib: int = 4096
    """MiB of a language's text that one task writes; a part begins a shard."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    kind: str = "unigram"
    """"unigram" (SentencePiece, as XLM-R's) or "byte_bpe" (byte-level BPE: no <unk>)."""
    vocab_size: int = 32_000
    """Ids of the tokenizer, special ones included."""
    sampling_alpha: float = 0.3
    """Share of a language in the text that the tokenizer learns from: p ~ n ** alpha, n its characters."""
    max_characters: int = 100_000_000
    """Text to learn from; a byte of it takes about 21 bytes of memory (unigram), at most 40 (byte_bpe)."""
    character_coverage: float = 0.9995
    """Of unigram: share of all characters that get a piece; the rest become <unk>."""
    max_memory_gib: float = 16.0
    """Training that needs more memory, by max_characters, is refused before it starts."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    dropped_samples: int = 3
    """Dropped documents kept in dropped/<reason>.jsonl and shown in the report, per reason; 0 = none."""
    kept_samples: int = 2
    """Kept documents shown in the report, per language."""
    all_dropped: bool = False
    """Whether every dropped document goes to dropped/, whole, with its reason."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    partition: str = ""
    """Partition of the jobs."""
    time: str = "24:00:00"
    """Longest time of a task."""
    cpus_per_task: int = 1
    """Cores of a task; a task uses one, more of them bring more memory."""
    memory_gib: int = 4
    """Memory per core."""
    qos: str = "normal"
    """Quality of service of the jobs."""
    tasks_per_job: int = 1
    """Tasks that one element of a job array runs, one after the other."""
    max_array_size: int = 1001
    """Longest job array that the cluster takes; more tasks than that are several arrays."""
    environment: str = ""
    """Shell command before each task, as `module load python`; the Python that runs this command is found by itself."""
    arguments: list[str] = field(default_factory=list)
    """More of sbatch, as "account=abc"."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    address: str = ""
    """A cluster's address, or "auto"; empty = one on this machine for the time of the run."""
    memory_gib: float = 2.0
    """Memory that a task reserves."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The list of steps, and all sections of a recipe."""

    steps: tuple[str, ...] = STEPS
    """Names of steps (chain.py), and own ones as "file.py:Class"."""
    run: RunConfig
    read: ReadConfig
    extract: ExtractConfig
    clean: CleanConfig
    mask: MaskConfig
    identify: IdentifyConfig
    filter: FilterConfig
    perplexity: PerplexityConfig
    deduplicate: DeduplicateConfig
    heldout: HeldoutConfig
    shards: ShardsConfig
    tokenizer: TokenizerConfig
    report: ReportConfig
    slurm: SlurmConfig
    ray: RayConfig

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.run.output)

    @property
    def hash(self) -> str:
        """Digest of all that decides the shards' bytes: settings and code, not where it runs."""
        sections = asdict(self)
        for name in ("run", "tokenizer", "slurm", "ray"):
            del sections[name]
        for name in ("archives", "archives_per_task", "max_bad_archives", "listing_base", "max_archives", "attempts"):
            del sections["read"][name]  # what they hold counts, not where they lie
        for name in FILES:
            section, key = name.split(".")
            if sections[section][key]:
                sections[section][key] = file_sha256(Path(sections[section][key]))
        for key in ("models", "tokenizers"):  # gigabytes each: by name and size
            pattern = Path(sections["perplexity"][key].replace("{language}", "*"))
            found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))) if pattern.name else []
            sections["perplexity"][key] = [(path.name, path.stat().st_size) for path in found]
        sections["filter"]["thresholds"] = described(self.filter.thresholds) if self.filter.rules else ""
        own = [Path(step.rpartition(":")[0]) for step in self.steps if ":" in step]
        code = [*sorted(Path(__file__).parent.glob("steps/*.py")), *own]
        parts = [json.dumps(sections, sort_keys=True).encode(), *(path.read_bytes() for path in code)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()
