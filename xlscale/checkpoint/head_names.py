"""Names on the Hub of what stands on the encoder; the encoder's own are in HF_NAMES of hub.py."""

# Our module -> theirs. lm_head.decoder is tied and never written: transformers 5.x un-ties it with only a warning,
# 4.56 crashes.
HEAD_NAMES: dict[str, str] = {
    "pooler.dense": "roberta.pooler.dense",
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.decoder": "lm_head",
    "classifier.dense": "classifier.dense",
    "classifier.output": "classifier.out_proj",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}

PREFIX = "roberta."
"""Of the encoder and the pooler, in all four families; the bare model's names go without it."""


def head_hf_name(ours: str) -> str:
    """Name on the Hub of a parameter outside the encoder, as in every class but the bare model."""
    module, leaf = ours.rsplit(".", 1)
    return f"{HEAD_NAMES[module]}.{leaf}"


def as_written(theirs: str, head: str) -> str:
    """A name as transformers' class for `head` (a key of HEADS) saves it: the bare model has no prefix."""
    return theirs.removeprefix(PREFIX) if head == "Model" else theirs
