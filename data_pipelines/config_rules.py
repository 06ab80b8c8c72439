"""What the values of a recipe may be, as data; config.py applies it."""

# Ranges of numbers: (lowest, highest), both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "run.workers": (1, 1024),
    "run.sort_memory_mib": (1, 2**20),
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
    "tokenizer.vocab_size": (16, 1_000_000),
    "tokenizer.sampling_alpha": (0, 1),
    "tokenizer.max_characters": (1000, 10**12),
    "tokenizer.character_coverage": (0.5, 1),
    "tokenizer.max_memory_gib": (0.001, 2**20),
    "report.dropped_samples": (0, 10**6),
}

# Values that a string, or each of a list, may have.
CHOICES: dict[str, tuple[str, ...]] = {
    "filter.rules": ("gopher", "gopher_repetition", "c4", "mc4", "fineweb"),
    "shards.compression": ("none", "zstd"),
    "read.format": ("auto", "warc", "jsonl", "parquet", "txt"),
    "read.language_from": ("text", "field", "path"),
    "read.robots": ("noarchive", "noindex", "nofollow", "nosnippet", "noai"),
}
