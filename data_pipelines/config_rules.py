"""What the values of a recipe may be, as data; config_load.py applies it."""

# The steps of a recipe that names none, chain.py says what each is.
STEPS = (
    "read", "refuse", "extract", "clean", "identify", "filter", "quality", "exact", "near", "mask", "hold_out", "write",
    "verify",
)  # fmt: skip
# Steps that look at one page at a time stand anywhere between read and write: those before the first of CORPUS_STEPS
# see all pages, the others what is left.
PAGE_STEPS = ("refuse", "extract", "clean", "mask", "identify", "filter", "quality", "perplexity")
CORPUS_STEPS = ("exact", "near", "paragraphs", "hold_out", "write", "verify", "tokenizer")
REQUIRED = ("read", "identify", "write", "verify")

# Settings that name a file: it must be there, and its content decides the result.
FILES = ("read.blocklist", "identify.model", "identify.thresholds", "perplexity.cutoffs")

# Settings that need a package: (setting, value or None for any) -> (its module, the extra of ours that installs it).
PACKAGES: dict[tuple[str, str | None], tuple[str, str]] = {
    ("extract.method", "trafilatura"): ("trafilatura", "trafilatura"),
    ("perplexity.models", None): ("kenlm", "kenlm"),
    ("identify.model", None): ("fasttext", "fasttext"),
}

# Numbers in files of sections per language: setting -> number -> (lowest, highest).
NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "identify.thresholds": {"min_probability": (0, 1), "min_percent": (0, 100)},
    "perplexity.cutoffs": {"head": (0, 1e9), "tail": (0, 1e9)},
}

# Ranges of numbers: (lowest, highest), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "run.workers": (1, 1024),
    "run.sort_memory_mib": (1, 2**20),
    "run.task_mib": (1, 2**30),
    "read.archives_per_task": (1, 10**6),
    "read.max_bad_archives": (0, 1),
    "read.max_faults": (0, 10**9),
    "read.max_page_bytes": (1024, 2**30),
    "read.max_archives": (0, 10**9),
    "read.attempts": (1, 100),
    "extract.timeout_seconds": (0.05, 3600),
    "extract.memory_mib": (64, 2**20),
    "identify.min_probability": (0, 1),
    "identify.min_percent": (0, 100),
    "filter.min_letters": (0, 1),
    "filter.max_duplicate_lines": (0, 1),
    "filter.max_short_lines": (0, 1),
    "filter.max_code_lines": (0, 1),
    "deduplicate.shingle": (2, 64),
    "deduplicate.bands": (1, 1024),
    "deduplicate.rows": (1, 1024),
    "deduplicate.min_similarity": (0, 1),
    "heldout.fraction": (0, 0.5),
    "heldout.min_documents": (0, 10**6),
    "heldout.max_documents": (0, 10**6),
    "shards.min_documents": (1, 10**9),
    "shards.documents_per_chunk": (1, 10**6),
    "shards.chunks_per_shard": (1, 10**6),
    "shards.part_mib": (1, 2**30),
    "tokenizer.vocab_size": (16, 1_000_000),
    "tokenizer.sampling_alpha": (0, 1),
    "tokenizer.max_characters": (1000, 10**12),
    "tokenizer.character_coverage": (0.5, 1),
    "tokenizer.max_memory_gib": (0.001, 2**20),
    "report.dropped_samples": (0, 10**6),
    "report.kept_samples": (0, 10**6),
    "slurm.cpus_per_task": (1, 1024),
    "slurm.memory_gib": (1, 2**20),
    "slurm.tasks_per_job": (1, 10**6),
    "slurm.max_array_size": (1, 10**7),
    "ray.memory_gib": (0.1, 2**20),
}

# Values that a string, or each of a list, may have.
CHOICES: dict[str, tuple[str, ...]] = {
    "run.executor": ("local", "slurm", "ray"),
    "extract.method": ("resiliparse", "trafilatura"),
    "perplexity.keep": ("head", "middle", "tail"),
    "tokenizer.kind": ("unigram", "byte_bpe"),
    "filter.rules": ("gopher", "gopher_repetition", "c4_lines", "c4", "mc4", "fineweb"),
    "shards.compression": ("none", "zstd"),
    "read.format": ("auto", "warc", "index", "jsonl", "parquet", "txt"),
    "read.language_from": ("text", "field", "path"),
    "read.robots": ("noarchive", "noindex", "nofollow", "nosnippet", "noai"),
}
