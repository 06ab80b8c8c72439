"""Identification by a fastText model, and thresholds of each language."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import config_load
from data_pipelines.__main__ import main
from data_pipelines.config import IdentifyConfig, RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.steps.burmese import burmese
from data_pipelines.steps.corpora import language_of_name
from data_pipelines.steps.identify import IdentifyLanguage, Vote, decide
from data_pipelines.steps.model import Model
from tests.test_pipeline import recipe
from tests.test_pipeline import small as small  # the fixture
from tests.test_pipeline_steps import declarations, document
from xlscale.data.shards import Corpus

# Labels as GlotLID and OpenLID have them; what is no language of XLM-R too.
LABELS = {
    "deu_1996": "deu_Latn", "eng": "eng_Latn", "fra": "fra_Latn", "nob": "nob_Latn", "nno": "nno_Latn",
    "rus": "rus_Cyrl", "jpn": "jpn_Jpan", "arb": "arb_Arab", "cmn_hans": "cmn_Hani", "zul": "zul_Latn",
    "als": "als_Latn", "mya": "mya_Mymr",
}  # fmt: skip


# fasttext-numpy2 0.10.4 begins with memory as it finds it: it trains in a process of its own, where that is empty, and
# again where the training has ended in NaN or in nonsense all the same.
TRAIN = """
import sys, fasttext
sizes = dict(dim=16, lr=0.5, epoch=100, minn=2, maxn=4, bucket=20_000)
model = fasttext.train_supervised(sys.argv[1], thread=1, verbose=0, **sizes)
model.save_model(sys.argv[2])
for line in open(sys.argv[3]):
    label, text = line.split(" ", 1)
    (found,), (probability,) = model.predict(text.strip())
    assert found == label and probability > 0.8, (found, label, probability)
"""


def train(path: Path, texts: dict[str, list[str]]) -> Path:
    """A small model of these labels, that knows its own lines."""
    pytest.importorskip("fasttext")
    single, whole = path.with_suffix(".lines"), path.with_suffix(".whole")
    single.write_text("".join(f"__label__{label} {text}\n" for label, some in texts.items() for text in some))
    whole.write_text("".join(f"__label__{label} {' '.join(some)}\n" for label, some in texts.items()))
    arguments = [sys.executable, "-c", TRAIN, str(single), str(path), str(whole)]
    errors = []
    for _ in range(8):
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        if run.returncode == 0:
            return path
        errors.append(run.stderr.strip().splitlines()[-1])
    raise AssertionError(errors)


def lines(name: str) -> list[str]:
    return [line for line in declarations()[name][0].split("\n") if len(line) > 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has seen the second half of each declaration."""
    texts = {label: lines(name)[len(lines(name)) // 2 :] for name, label in LABELS.items()}
    return str(train(tmp_path_factory.mktemp("model") / "model.bin", texts))


def first_half(name: str) -> str:
    return "\n".join(lines(name)[: len(lines(name)) // 2])


def identified(text: str, **settings: object) -> tuple[str | None, str | None, str]:
    """(language, reason, text) of a document after the step."""
    found = document(text)
    IdentifyLanguage(IdentifyConfig(**{"min_probability": 0.5, **settings})).process(found)
    return found.metadata.get("language"), found.metadata.get("dropped"), found.text


@pytest.mark.parametrize(
    ("name", "code"),
    [("deu_Latn", "de_DE"), ("de", "de_DE"), ("nno_Latn", "no_XX"), ("hin_Latn", "hi_Latn"), ("hi_rom", "hi_Latn"),
     ("ta_rom", "ta_Latn"), ("ta", "ta_IN"), ("my_zaw", "my_Qaag"), ("mya_Mymr", "my_MM"), ("zho_Hant", "zh_TW"),
     ("cmn_Hani", "zh_CN"), ("srp_Cyrl", "sr_RS"), ("srp_Latn", "sr_RS"), ("ckb_Arab", None), ("zul_Latn", None)],
)  # fmt: skip
def test_labels_of_models_and_names_of_corpora_are_our_codes(name, code):
    assert language_of_name(name) == code


def test_model_knows_the_languages_of_text_it_has_not_seen(model):
    for name, code in (("deu_1996", "de_DE"), ("eng", "en_XX"), ("rus", "ru_RU"), ("jpn", "ja_XX"), ("arb", "ar_AR")):
        assert identified(first_half(name), model=model)[:2] == (code, None), name
    assert identified(first_half("zul"), model=model)[:2] == (None, "language_unsupported")


def test_two_labels_that_are_one_language_to_us_share_their_probability(model):
    half = len(lines("nob")) // 4
    both = "\n".join([*lines("nob")[:half], *lines("nno")[:half]])
    guess = Model(model).guess(both)
    alone = [p for label, p in zip(*Model(model).model.predict(" ".join(both.split()), k=3), strict=True)
             if label.startswith("__label__n")]  # fmt: skip
    assert guess.code == "no_XX"
    assert guess.probability == pytest.approx(sum(alone))
    assert len(alone) == 2


def test_chinese_without_a_script_in_its_label_is_told_apart(model):
    assert identified(first_half("cmn_hans"), model=model)[0] == "zh_CN"
    assert identified(first_half("cmn_hant"), model=model, min_probability=0.0)[0] == "zh_TW"


def test_alemannic_of_lid_176_is_not_albanian(tmp_path, model):
    names = {"sq": "als", "als": "deu_1901", "fr": "fra"}  # label -> declaration
    wikipedia = str(train(tmp_path / "lid.bin", {label: lines(name) for label, name in names.items()}))
    assert identified(first_half("als"), model=wikipedia)[0] == "sq_AL"
    assert identified(first_half("deu_1901"), model=wikipedia)[1] == "language_unsupported"
    assert identified(first_half("als"), model=model)[0] == "sq_AL"  # ISO's als_Latn


def test_page_in_two_languages_keeps_the_paragraphs_of_the_main_one_to_the_model(model):
    german, english = first_half("deu_1996"), lines("eng")[3:8]
    language, _, text = identified("\n".join([german, *english]), model=model)
    assert language == "de_DE"
    assert sum(line in text for line in english if len(line) >= 80) == 0
    assert all(line in text for line in german.split("\n"))


def test_threshold_of_a_language_goes_before_that_of_all(model, tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("[default]\nmin_probability = 0\n[de_DE]\nmin_probability = 1\n")
    text = "\n".join([first_half("deu_1996")[:300], first_half("nob")[:280]])
    assert identified(text, model=model, thresholds=str(limits), min_paragraph=10**6)[1] == "language_uncertain"
    limits.write_text("[fr_XX]\nmin_probability = 1\n")
    assert identified(text, model=model, thresholds=str(limits), min_probability=0.0)[0] == "de_DE"


def test_votes_that_disagree_are_weighed_by_the_thresholds_of_their_language(tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("[id_ID]\nmin_percent = 50\n[ku_TR]\nmin_probability = 0.99\n")
    step = IdentifyLanguage(IdentifyConfig(thresholds=str(limits)))
    assert decide(Vote("ms", 1.0), Vote("id", 0.6), step.limits) == ("id_ID", "")
    assert decide(Vote("id", 1.0), Vote("ms", 0.6), step.limits) == (None, "language_uncertain")
    assert decide(Vote("ku", 0.98), Vote("un", 0.0), step.limits) == (None, "language_uncertain")
    assert decide(Vote("mg", 0.98), Vote("un", 0.0), step.limits) == ("mg_MG", "")


def test_recipe_with_a_model_makes_the_shards_of_its_languages(model, small, tmp_path, monkeypatch, capsys):
    path = recipe(tmp_path, f"{small}/*.warc.gz", more=f"[identify]\nmodel = '{model}'\nmin_probability = 0.5\n")
    assert main([str(path)]) == 0
    assert Corpus.open(tmp_path / "out/shards").languages == ["ar_AR", "de_DE", "fr_XX", "ja_XX", "ru_RU"]
    certainty = json.loads((tmp_path / "out/report.json").read_text())["histograms"]["certainty"]
    assert sorted(certainty["kept"]) == ["ar_AR", "de_DE", "fr_XX", "ja_XX", "ru_RU"]
    limits = tmp_path / "limits.toml"
    limits.write_text("[de]\nmin_probability = 1\n[fr_XX]\nmin_percent = 200\nmin_percents = 1\n")
    monkeypatch.setattr(config_load, "find_spec", lambda _: None)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"identify.thresholds={limits}"])
    text = "\n".join(caught.value.problems)
    for part in (
        "[de] is no language of xlscale.languages; write [de_DE] or [default]",
        "[fr_XX] min_percent = 200 must be a number from 0 to 100",
        "[fr_XX] unknown key min_percents; there are min_probability, min_percent",
        "needs the package fasttext: pip install 'xlscale[fasttext]'",
    ):
        assert part in text, part


# Three lines of the Burmese declaration as python-myanmar 1.10 converts them.
ZAWGYI = """\
လူခပ္သိမ္း၏ မ်ိဳး႐ိုးဂုဏ္သိကၡာႏွင့်တကြ လူတိုင္းအညီအမၽႇခံစားခြင့်ရွိသည့် အခြင့်အေရးမ်ားကို အသိအမွတ္ျပဳျခင္းသည္ အေျခခံအုတ္ျမစ္ျဖစ္ေသာေၾကာင့်လည္းေကာင္း၊
လူခပ္သိမ္းတို႔သည္၊ တရားလက္လြတ္ ႏွိပ္စက္ကလူျပဳမႈ၊ အုပ္စိုးမႈႏွင့် ဖိစီး ၫွဉ္းပန္းမႈ တို႔ကို ေတာ္လွန္ျခင္း၊ ပုန္ကန္ျခင္းမျပဳေစရန္၊
ကမၻာ့ကုလသမဂၢအဖြဲ႕ဝင္ ႏိုင္ငံတို႔သည္ ကုလသမဂၢအဖြဲ႕ႏွင့်ပူးေပါင္း၍ လူအခြင့်အေရးမ်ားကိုလည္းေကာင္း၊ အေျခခံလြတ္လပ္ခြင့် အခြင့်အေရးမ်ားကိုလည္းေကာင္း၊
"""


def test_burmese_in_zawgyi_is_told_from_unicode_by_every_line_of_a_declaration(model):
    unicode = [line for line in declarations()["mya"][0].split("\n") if len(line) > 25]
    assert len(unicode) > 50
    assert {burmese(line) for line in unicode} == {"my_MM"}
    assert {burmese(line) for line in ZAWGYI.split("\n") if line} == {"my_Qaag"}
    assert identified(ZAWGYI)[0] == identified(ZAWGYI, model=model)[0] == "my_Qaag"
    assert identified(declarations()["mya"][0])[0] == identified(first_half("mya"), model=model)[0] == "my_MM"
    assert identified(ZAWGYI, languages=["my_MM"])[1] == "language_unwanted"


@pytest.mark.parametrize(
    "text",
    [
        "ၵူၼ်းၵူႊၵေႃႉ မီးသုၼ်ႇလႆႈ တႃႇၶီးၸိုၼ်ႈ၊ တႃႇလွတ်ႈလႅဝ်းထၢင်ႇႁၢင်ႊ လႄႈ တႃႇႁူမ်ႇလူမ်ႈၸူဝ်ႊပၢၼ်မၼ်း။",  # Shan
        "မွဲဍုၚ်ကဵုမွဲဍုၚ် ညံၚ်သ္ဂောံသၠုၚ်ပတိုန် ပရေၚ်ဖောအ်ဗြေဝ် ကၠောံက္ဍ ဍုက်ကေဝ် ဆာန်ကၟိန် ညးသကအ်ဂှ် ဒှ်တၚ်နွံပၟိက် မွဲဍာံဍာံရ။",  # Mon
    ],
)
def test_other_languages_in_the_script_of_burmese_are_not_taken_for_it(text):
    assert identified(text)[:2] == (None, "language_unsupported")
