"""The recipe of a corpus: one dataclass per TOML section; load_recipe() shows all problems at once."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data_pipelines.config_rules import CHOICES, RANGES
from data_pipelines.steps.thresholds import ThresholdError, described, thresholds
from xlscale.languages import language_id


class RecipeError(ValueError):
    """What a person has to mend, one line per problem: the value, the rule and the way out."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: str
    """Folder that gets shards/, heldout/, dropped/, tokenizer/, report.json; relative to where one starts."""
    workers: int = 1
    """Processes at work at once; the result is the same with any number."""
    sort_memory_mib: int = 256
    """Memory a process takes to sort hashes in search of duplicates; with less it reads them more often."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    archives: list[str]
    """WARC and WET files and corpora (jsonl, parquet, txt; .gz, .zst, .xz, .lz4), patterns of them, URLs (http, s3),
    or CommonCrawl's listings (*.paths.gz); one task each. A URL stands for its content: a change is not noticed."""
    max_faults: int = 3
    """Damaged places (a cut end, a broken gzip member, an unreadable record) that one archive may have."""
    max_page_bytes: int = 8_388_608
    """Pages longer than this, after unpacking, are dropped."""
    format: str = "auto"
    """Of all files: "warc" (WET too), "jsonl", "parquet", "txt" (empty lines between documents), "auto": by name."""
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
    timeout_seconds: float = 10.0
    """A page that takes longer is dropped; Resiliparse takes about 0.4 ms for an ordinary one."""
    memory_mib: int = 1024
    """Memory that the extracting process may take; a page that needs more is dropped."""


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    mojibake: bool = True
    """Mend text that was decoded in a wrong charset (ftfy)."""
    emails: bool = True
    """Put email@example.com in the place of e-mail addresses."""
    ip_addresses: bool = True
    """Put 192.0.2.1 or 2001:db8::1 in the place of public IP addresses."""


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    languages: list[str] = field(default_factory=list)
    """Codes of xlscale.languages to keep; empty = every language of XLM-R."""
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
    """Sets of published rules that hold besides: gopher, gopher_repetition, c4, mc4, fineweb."""
    thresholds: str = ""
    """Their thresholds per language: a TOML file, or a folder of FineWeb-2's; empty = those of the papers."""


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
    paragraphs: bool = False
    """Whether paragraphs that another page of the language had before are taken out, as CCNet does."""


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


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    vocab_size: int = 32_000
    """Ids of the tokenizer, special ones included."""
    sampling_alpha: float = 0.3
    """Share of a language in the text that the tokenizer learns from: p ~ n ** alpha, n its characters."""
    max_characters: int = 100_000_000
    """Text to learn from; SentencePiece takes about 19 bytes of memory for each byte."""
    character_coverage: float = 0.9995
    """Share of all characters that get a piece; the rest become <unk>."""
    max_memory_gib: float = 16.0
    """Training that needs more memory, by max_characters, is refused before it starts."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    dropped_samples: int = 3
    """Dropped documents kept in dropped/<reason>.jsonl, per reason and task; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All sections of a recipe."""

    run: RunConfig
    read: ReadConfig
    extract: ExtractConfig
    clean: CleanConfig
    identify: IdentifyConfig
    filter: FilterConfig
    deduplicate: DeduplicateConfig
    heldout: HeldoutConfig
    shards: ShardsConfig
    tokenizer: TokenizerConfig
    report: ReportConfig

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.run.output)

    @property
    def hash(self) -> str:
        """Digest of all that decides the shards' bytes: settings and code, not where it runs."""
        sections = asdict(self)
        for name in ("run", "tokenizer"):
            del sections[name]
        for name in ("archives", "listing_base", "max_archives", "attempts"):
            del sections["read"][name]  # what they hold counts, not where they lie
        if self.read.blocklist:
            sections["read"]["blocklist"] = hashlib.sha256(Path(self.read.blocklist).read_bytes()).hexdigest()
        sections["filter"]["thresholds"] = described(self.filter.thresholds) if self.filter.rules else ""
        code = sorted(Path(__file__).parent.glob("steps/*.py"))
        parts = [json.dumps(sections, sort_keys=True).encode(), *(path.read_bytes() for path in code)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


SECTIONS: dict[str, type] = get_type_hints(Recipe)
TYPES = {f"{name}.{key}": kind for name, cls in SECTIONS.items() for key, kind in get_type_hints(cls).items()}
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list[str]: "a list of strings"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the TOML file `path`, applies overrides ("section.key=value"); RecipeError lists all problems."""
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("data_*.toml"))
        raise RecipeError([f"recipe {path} does not exist; there are {', '.join(there) or 'none in configs/'}"])
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: is not valid TOML: {error}; mend it there"]) from None
    problems: list[str] = []
    given: dict[str, Any] = {}
    source: dict[str, str] = {}
    for section, keys in raw.items():
        if not isinstance(keys, dict):
            problems.append(f"{path}: {section} stands outside of a section; write [section] above it")
        elif section not in SECTIONS:
            problems.append(f"{path}: unknown section [{section}]{_nearest(section, SECTIONS)}")
        else:
            given |= {f"{section}.{key}": value for key, value in keys.items()}
    source |= dict.fromkeys(given, str(path))
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            problems.append(f"--set {override}: has no value; write --set section.key=value")
            continue
        given[name], source[name] = _override_value(name, text), f"--set {override}"
    for name, value in given.items():
        if name not in TYPES:
            problems.append(f"{source[name]}: unknown key {name}{_nearest(name, TYPES)}")
        elif not _fits(value, TYPES[name]):
            problems.append(f"{source[name]}: {name} = {value!r} must be {KINDS[TYPES[name]]}")
        elif name in RANGES and not RANGES[name][0] <= value <= RANGES[name][1]:
            low, high = RANGES[name]
            problems.append(f"{source[name]}: {name} = {value} must be from {low:g} to {high:g}")
        elif name in CHOICES:
            problems += [
                f"{source[name]}: {name} = {one!r} must be one of {', '.join(CHOICES[name])}"
                for one in (value if isinstance(value, list) else [value])
                if one not in CHOICES[name]
            ]
    problems += _missing(path, given)
    blocklist = given.get("read.blocklist")
    if isinstance(blocklist, str) and blocklist and not Path(blocklist).is_file():
        problems.append(f"{source['read.blocklist']}: read.blocklist = {blocklist!r} is no file (from {Path.cwd()})")
    problems += _wrong_thresholds(given)
    problems += _unknown_languages(given.get("identify.languages", []), source.get("identify.languages", ""))
    if problems:
        raise RecipeError(problems)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in given.items():
        section, key = name.split(".")
        values[section][key] = float(value) if TYPES[name] is float else value
    return Recipe(**{section: SECTIONS[section](**keys) for section, keys in values.items()})


def _missing(path: Path, given: dict[str, Any]) -> list[str]:
    return [
        f"{path}: {section}.{spec.name} has no default and is missing; add `{spec.name} = ...` in [{section}]"
        for section, cls in SECTIONS.items()
        for spec in fields(cls)
        if f"{section}.{spec.name}" not in given and spec.default is MISSING and spec.default_factory is MISSING
    ]


def _unknown_languages(codes: Any, source: str) -> list[str]:
    problems = []
    for code in codes if isinstance(codes, list) else []:
        try:
            language_id(str(code))
        except ValueError as error:
            problems.append(f"{source}: identify.languages: {error}")
    return problems


def _wrong_thresholds(given: dict[str, Any]) -> list[str]:
    path = given.get("filter.thresholds")
    if not path or not isinstance(path, str):
        return []
    if not given.get("filter.rules"):
        return [f"filter.thresholds = {path!r} has no effect without filter.rules; name sets of rules there"]
    try:
        thresholds(path)
    except ThresholdError as error:
        return error.problems
    return []


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is close to a known one, by itself or by its last part."""
    names = list(known)
    same_key = [other for other in names if other.partition(".")[2] == name.partition(".")[2] != ""]
    close = same_key or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _override_value(name: str, text: str) -> Any:
    if TYPES.get(name) is str:
        return text.strip("\"'")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
