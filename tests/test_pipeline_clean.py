"""Cleaning: charsets mended, one form of each character, no junk, no addresses of people and machines."""

import json
import time

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.__main__ import main
from data_pipelines.config import CleanConfig, MaskConfig
from data_pipelines.steps.clean import (
    CleanText,
    mend,
    normalise,
)
from data_pipelines.steps.extract import extract
from data_pipelines.steps.mask import MaskAddresses, mask_emails, mask_ip_addresses
from tests.test_pipeline_steps import archive, declarations, document, page, record


def garbled(text: str, charset: str) -> str:
    """UTF-8, read as another charset; bytes that it lacks as control characters, as browsers do."""
    return "".join(
        bytes([byte]).decode(charset, "ignore") or chr(byte) for line in [text] for byte in line.encode("utf-8")
    )


@pytest.mark.parametrize(
    ("text", "charset"),
    [
        ("Das größte Gebäude – „schön“", "cp1252"),
        ("déjà vu… l’été à Orléans", "cp1252"),
        ("Привет, мир! Права человека", "cp1252"),
        ("Привет, мир! Права человека", "cp1251"),
        ("すべての人間は自由", "cp1252"),
        ("příliš žluťoučký kůň úpěl", "cp1250"),
        ("“quoted” text", "latin-1"),
        ("Καλημέρα κόσμε", "cp1252"),
        ("schöne Größe, déjà vu", "mac_roman"),
        ("schöne Größe, déjà vu", "cp437"),
    ],
)
def test_text_read_in_a_wrong_charset_is_mended_and_counted(text, charset):
    fine = "A line that is fine."
    assert garbled(text, charset) != text
    mended, lines = mend(f"{fine}\n{garbled(text, charset)}")
    assert mended.split("\n") == [fine, ftfy.fix_encoding(text)]
    assert lines == 1
    assert mend(mended) == (mended, 0)


def test_right_text_of_all_languages_is_not_mended():
    for name, (text, _, _) in declarations().items():
        assert mend(text) == (text, 0), name


def test_lines_shown_to_ftfy_are_those_that_it_would_mend():
    for name in ("deu_1996", "fra", "ces", "rus", "ell_monotonic", "vie", "hun", "pol", "tur"):
        text = declarations()[name][0][:3000].split()
        for charset in ("cp1252", "cp1250", "cp1251"):
            for place in range(0, len(text), 3):
                wrong = garbled(" ".join(text[place : place + 3]), charset)
                assert mend(wrong)[0] == ftfy.fix_encoding(wrong), (name, charset)


def test_page_whose_server_and_text_disagree_is_mended_whole():
    text = "Er sagte: “Das ist größer.” " * 20
    extracted, _ = extract(page(garbled(text, "cp1252")).encode())
    cleaned = document(extracted)
    CleanText(CleanConfig()).process(cleaned)
    assert "“Das ist größer.”" in cleaned.text
    assert cleaned.metadata["mended_lines"] == 1
    left = document(extracted)
    CleanText(CleanConfig(mojibake=False)).process(left)
    assert "Ã¶" in left.text
    assert left.metadata["mended_lines"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh"),
        ("a\x00b\x1bc\x7fd\x9fe\u00adf\ufeffg\ue000h\ud800i\uffffj", "abcdefghij"),
        ("\u202bشلام\u202c \u2066x\u2069 ש\u200eם\u200f", "شلام x שם"),
        ("e\u0301 A\u030a ｶ\u3099", "é Å ｶ\u3099"),
        ("wo\u200brd wo\u200crd wo\u2060rd \u200bx\u200b", "word word word x"),
        ("می\u200cخواهم \u200cx", "می\u200cخواهم x"),  # Persian spelling
        ("क्\u200dष क्\u200cष", "क्\u200dष क्\u200cष"),  # Indic spelling
        ("👩\u200d💻", "👩\u200d💻"),
        ("ភាសា\u200bខ្មែរ\u200b។\u200b ក", "ភាសា\u200bខ្មែរ\u200b។ ក"),  # ends of words
        ("中\u200b文", "中文"),
        ("a \u00a0\u3000\t b\n\n\n\n c", "a b\n\nc"),
    ],
)
def test_normalised_text_keeps_spelling_and_loses_junk(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


_ODD = st.sampled_from("a é\u0301\u200b\u200c\u200d\ud800\x85\x9f\r\n\t \u00a0\u3000កខيक\u094d中\u2126\ufeff👩@.")


@settings(max_examples=300, deadline=None)
@given(st.text(_ODD | st.characters(), max_size=40))
def test_normalising_twice_is_normalising_once_and_gives_valid_text(text):
    once = normalise(text)
    assert normalise(once) == once
    once.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to anna.b+c@mail.uni-x.de.", "Write to email@example.com."),
        ("<mailto:a@b.co.uk>, (jürgen@bücher.de)", "<mailto:email@example.com>, (email@example.com)"),
        ("请联系info@beispiel.cn谢谢", "请联系email@example.com谢谢"),
        ("Почта: иван@почта.рф!", "Почта: email@example.com!"),
        ("...x@y.org", "...email@example.com"),
        ("you@example.com me@sub.example.org root@localhost a@b.test", None),
        ("npm i react@18.2.0 @user @media a @ b.de x@y", None),
    ],
)
def test_email_addresses_are_masked_where_they_are_somebodys(text, expected):
    masked, count = mask_emails(text)
    assert masked == (expected or text)
    assert count == (masked.count("email@example.com") if expected else 0)
    assert mask_emails(masked) == (masked, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 8.8.50.8, 93.184.216.34:80", "from 192.0.2.1, 192.0.2.1:80"),
        ("DNS是9.9.9.99。", "DNS是192.0.2.1。"),
        ("at 2606:4700:4700::1111 and 2001:4860:4860:0:0:0:0:8888.", "at 2001:db8::1 and 2001:db8::1."),
        ("127.0.0.1 10.0.0.3 192.168.1.1 192.0.2.7 224.0.0.1 0.0.0.0 ::1 fe80::1 2001:db8::5", None),
        ("v1.2.3.99 1.2.3.99.5 999.1.1.1 12:30:45 std::vector abc::def 2.6.32-5 80.8.8.8-2", None),
        ("8.2.4.1. Modems\nSee 12.1.3.2, “Routers”; in 10.0.49.2 it is mended", None),
    ],
)
def test_public_ip_addresses_are_masked_and_no_others(text, expected):
    masked, count = mask_ip_addresses(text)
    assert masked == (expected or text)
    assert (count > 0) == bool(expected)
    assert mask_ip_addresses(masked) == (masked, 0)


def test_text_made_to_slow_the_search_down_is_searched_in_no_time():
    started = time.monotonic()
    for part in ("a" * 200_000 + "@", "a@" * 100_000, "a.b-" * 50_000 + "@", "x@" + "a." * 100_000, "1." * 100_000,
                 "2001:" * 40_000, "Ã" * 200_000, "\u200c" * 200_000):  # fmt: skip
        cleaned = document(f"{part} b")
        CleanText(CleanConfig()).process(cleaned)
        MaskAddresses(MaskConfig()).process(cleaned)
    assert time.monotonic() - started < 20  # it takes one; without the bounds, minutes


def test_what_was_masked_is_counted_in_the_report_and_gone_from_the_shards(tmp_path, capsys):
    lines = [line for line in declarations()["deu_1996"][0].split("\n") if len(line) > 40]
    records = [
        record(f"http://a.test/{i}", page("\n".join([*lines[i : i + 6], f"An leser{i}@zeitung{i}.de, 9.9.99.{i}."]))
               .encode())
        for i in range(0, 48, 6)
    ]  # fmt: skip
    archive(tmp_path / "a.warc.gz", records)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\noutput = "{tmp_path}/out"\n[read]\narchives = ["{tmp_path}/a.warc.gz"]\n')
    assert main([str(recipe)]) == 0
    assert "in what is kept: 8 e-mail and 8 IP addresses masked, 0 lines mended" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cleaned"] == {"mended_lines": 0, "removed_lines": 0, "emails": 8, "ip_addresses": 8}
    shard = next((tmp_path / "out/shards").glob("*/*.tar")).read_bytes()
    assert b"leser" not in shard
    assert shard.count(b"email@example.com, 192.0.2.1.") == report["total"]["training"]
    assert main([str(recipe), "--set", "mask.emails=no"]) == 2
    assert "mask.emails = 'no' must be true or false" in capsys.readouterr().err
    assert main([str(recipe), "--set", "mask.emails=false"]) == 0
    assert b"leser" in next((tmp_path / "out/shards").glob("*/*.tar")).read_bytes()
