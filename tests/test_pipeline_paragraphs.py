"""Paragraphs that come again in data_pipelines: what counts as the same, which stays, what is counted."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.__main__ import main
from data_pipelines.config_load import load_recipe
from data_pipelines.config_rules import STEPS
from data_pipelines.steps.document import drop, dropped
from data_pipelines.steps.join import mark_repeats
from data_pipelines.steps.paragraphs import DropRepeatedParagraphs, paragraph_key
from tests.test_pipeline_steps import archive, declarations, document, page, record
from xlscale.data.shards import Corpus


def taken_out(texts: Sequence[str | Document], least: int = 0, memory: int = 1 << 20) -> list[Document]:
    """The documents after the step."""
    step = DropRepeatedParagraphs(least)
    step.memory = memory
    return list(step.run(document(one, f"{i}") if isinstance(one, str) else one for i, one in enumerate(texts)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ce site utilise des cookies.", "CE SITE, utilise  des cookies"),
        ("Déjà vu, à 12:30!", "deja vu a 99:45"),
        ("Posted on 2024-01-02", "posted on 1999/12/31"),
        ("이 페이지는 저작권이 있습니다.", "이 페이지는 저작권이 있습니다"),
    ],
)
def test_paragraphs_are_the_same_without_case_accents_punctuation_and_numbers(one, other):
    assert paragraph_key(one) == paragraph_key(other)
    assert paragraph_key(one) != paragraph_key(one + " x")


def test_first_of_equal_paragraphs_stays_also_inside_of_one_page():
    texts = ["A menu\nfirst text\na MENU!", "A menu\n\nsecond text\n\n\nA menu\n\nend", "second text"]
    found = taken_out(texts)
    assert [d.text for d in found] == ["A menu\nfirst text", "second text\n\nend", ""]
    assert [d.metadata["repeated_characters"] for d in found] == [8, 17, 11]


def test_lines_without_letters_are_no_paragraphs():
    assert [d.text for d in taken_out(["* * *\none", "* * *\ntwo"])] == ["* * *\none", "* * *\ntwo"]


def test_page_of_which_too_little_is_left_is_dropped_and_dropped_pages_do_not_count():
    gone = document("the same words", "gone")
    drop(gone, "near_duplicate")
    found = taken_out([gone, "the same words\nsome more", "the same words\nless"], least=6)
    assert [d.metadata["dropped"] if dropped(d) else d.text for d in found] == [
        "near_duplicate",
        "the same words\nsome more",
        "repeated_paragraphs",
    ]
    assert gone.text == "the same words"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh!"), max_size=8), max_size=30), st.sampled_from([64, 700, 1 << 20]))
def test_every_paragraph_stays_exactly_once_whatever_the_memory(pages, memory):
    found = taken_out(["\n".join(lines) for lines in pages], memory=memory)
    seen: set[str] = set()
    for lines, kept in zip(pages, found, strict=True):
        expected = [line for line in lines if line == "!" or not (line in seen or seen.add(line))]
        assert kept.text.split("\n") == expected or (not expected and not kept.text)


@pytest.mark.parametrize("memory", [1 << 20, 1 << 26])
def test_repeats_are_all_but_the_first_over_many_blocks(memory):
    keys = np.random.default_rng(3).integers(0, 40_000, 200_000).astype(np.uint64)
    keys[::5] = 7
    marks = np.zeros(len(keys), np.uint8)
    mark_repeats(keys, memory, marks)
    assert np.flatnonzero(marks == 0).tolist() == sorted(np.unique(keys, return_index=True)[1].tolist())


PLACE = STEPS.index("near") + 1
WITH_PARAGRAPHS = f"steps={[*STEPS[:PLACE], 'paragraphs', *STEPS[PLACE:]]}"


def test_recipe_takes_paragraphs_out_when_asked_and_gives_the_same_bytes_with_two_workers(tmp_path):
    notice = "This notice about the use of this site and of its many cookies stands on each and every page. " * 2
    records = []
    for name in ("eng", "deu_1996"):
        lines = [line for line in declarations()[name][0].split("\n") if line]
        for i in range(0, len(lines) - 6, 6):
            text = "\n".join([*lines[i : i + 6], notice])
            records.append(record(f"http://{name}.test/{i}", page(text).encode()))
    archive(tmp_path / "a.warc.gz", records)
    (tmp_path / "r.toml").write_text(f'[run]\noutput = ""\n[read]\narchives = ["{tmp_path}/a.warc.gz"]\n')

    def run(name: str, *more: str) -> tuple[dict, str, Path]:
        out = tmp_path / name
        settings = [f"run.output={out}", "deduplicate.min_similarity=1", "heldout.fraction=0", *more]
        arguments = [str(tmp_path / "r.toml"), *(part for one in settings for part in ("--set", one))]
        assert main(arguments) == 0
        corpus = Corpus.open(out / "shards")
        text = "\n".join(d["text"] for code in corpus.languages for d in corpus.read(code))
        return json.loads((out / "report.json").read_text()), text, out

    assert "paragraphs" not in load_recipe(tmp_path / "r.toml").steps
    before, text, _ = run("before")
    assert text.count(notice.strip()) > 10
    assert "repeated" not in before["languages"]["en_XX"]["characters"]
    after, text, out = run("after", WITH_PARAGRAPHS, "run.sort_memory_mib=1")
    assert text.count(notice.strip()) <= 2  # one of each language
    assert after["languages"]["en_XX"]["characters"]["repeated"] > 5 * len(notice)
    assert after["total"]["read"] == before["total"]["read"]
    again, same, other = run("again", WITH_PARAGRAPHS, "run.workers=2")
    assert (again["fingerprint"], same) == (after["fingerprint"], text)
    for path in (out / "heldout").glob("*"):
        assert path.read_bytes() == (other / "heldout" / path.name).read_bytes()
