"""`fedmpt conditions` as a person meets it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedmpt_core.conditions.class_list import read_classes
from fedmpt_core.conditions.cooccurrence import read_counts
from fedmpt_core.config.condition_lists import load_conditions, read_content
from fedmpt_core.config.toml import ConfigError, load_site
from fedmpt_core.data.scenes import CLASSES
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, read_site_ledger
from fedmpt_flare.cli.conditions import conditions
from tests.tiny_llm import network, tokenizer

ROOT = Path(__file__).parents[3]
LEXICON = {"schema": 1, "conditions": {"light": ["in the dark", "in the sun"], "place": ["indoors", "outdoors"]}}


def fedmpt(*arguments: object) -> Result:
    return CliRunner().invoke(conditions, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The sentence that a person would see."""
    result = fedmpt(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def test_the_lists_are_shown() -> None:
    result = fedmpt("list")
    assert result.exit_code == 0
    assert "released-5" in result.output
    listed = {one["name"]: one for one in json.loads(fedmpt("list", "--json").output)}
    assert listed["paper-5"]["conditions"] == list(load_conditions("paper-5").conditions)
    for name in listed:
        shown = fedmpt("show", name)
        assert shown.exit_code == 0
        assert load_conditions(name).digest in shown.output
        assert json.loads(fedmpt("show", name, "--json").output)["digest"] == load_conditions(name).digest
    assert "no model was asked" in refused("show", "paper-5", "--answers")
    assert "is not known" in refused("show", "paper-6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    words = tokenizer()
    network(words).save_pretrained(made / "tiny")
    words.save_pretrained(made / "tiny")
    (made / "lexicon.json").write_text(json.dumps(LEXICON))
    (made / "classes.txt").write_text("dog\n\n sofa \nbus\n")
    return made


WRITING = [
    ("--candidates", 15),
    ("--sentences", 3),
    ("--max-new-tokens", 160),
    ("--temperature", 0),
    ("--batch-size", 8),
]


def scorer(folder: Path, out: Path) -> tuple[object, ...]:
    words = ("--lexicon", folder / "lexicon.json", "--conditions", 2, "--budget", 3, "--max-cosine", 1)
    where = ("--model", folder / "tiny", "--device", "cpu", "--out", out)
    return ("discover", folder / "classes.txt", "--scorer", *words, *where)


def test_a_list_from_start_to_job(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    result = fedmpt(*scorer(folder, out), "--pictures", 2)
    assert result.exit_code == 0, result.output
    assert "Model tiny chooses from a lexicon" in " ".join(result.output.split())
    written = load_conditions(out)
    assert (written.name, written.classes) == ("mine", ("dog", "sofa", "bus"))
    assert set(written.conditions) == {"light", "place"}
    assert {p.name for p in tmp_path.iterdir()} == {"mine.json", "mine.answers.jsonl"}
    raw = json.loads(fedmpt("show", out, "--answers", "--json").output)["raw_answers"]
    assert [r["labels"] for r in raw] and len(raw) == 3
    assert "score 2: -" in fedmpt("show", out, "--answers").output

    again = fedmpt(*scorer(folder, tmp_path / "again.json"), "--pictures", 2, "--json")
    printed = json.loads(again.output)
    assert printed == read_content(tmp_path / "again.json")
    assert printed["provenance"] == read_content(out)["provenance"]


def test_bad_arguments_are_a_sentence_before_any_work(folder: Path, tmp_path: Path) -> None:
    good = scorer(folder, tmp_path / "mine.json")
    (tmp_path / "there.json").write_text("precious")
    for out in ("there.json", "mine.txt", "nowhere/mine.json"):
        assert "name a new .json file in an existing folder" in refused(*scorer(folder, tmp_path / out))
    writer = tuple(a for a in good if a not in ("--scorer", "--lexicon", folder / "lexicon.json"))
    assert "candidates=2 is out of range" in refused(*writer, "--candidates", 2, "--conditions", 3)
    assert "with --scorer only" in refused(*(a for a in good if a != "--scorer"))
    for option, value in WRITING:
        assert f"{option}: of a model that writes" in refused(*good, option, value)
    assert "--candidates, --batch-size: of a model" in refused(*good, "--batch-size", 8, "--candidates", 15)
    assert "no such folder or GGUF file" in refused(*good, "--model", tmp_path / "nothing")
    assert "63" in refused(*good, "--device", "cuda:63")
    assert "cannot be read" in refused(*good, "--counts", tmp_path / "none.json")
    (tmp_path / "mine.answers.jsonl").write_text("my own notes")
    assert "is no file of raw answers" in refused(*good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.answers.jsonl", "there.json"]
    assert (tmp_path / "there.json").read_text() == "precious"


def test_a_scorer_keeps_as_many_as_asked_for_and_needs_two_label_sets(folder: Path, tmp_path: Path) -> None:
    good = scorer(folder, tmp_path / "mine.json")
    assert "only 2 of 2 candidates" in refused(*good, "--conditions", 20)  # no word of candidates=15
    one = scorer(folder, tmp_path / "one.json")
    assert "budget=1 and 3 classes give one label set" in refused(*one, "--budget", 1)
    (tmp_path / "two.txt").write_text("dog\nsofa\n")
    assert "2 classes give one label set" in refused(one[0], tmp_path / "two.txt", *one[2:])
    assert {p.name for p in tmp_path.iterdir()} == {"mine.answers.jsonl", "two.txt"}


def test_a_random_model_cannot_write_a_list(folder: Path, tmp_path: Path) -> None:
    few = ("--budget", 2, "--max-new-tokens", 8, "--model", folder / "tiny", "--device", "cpu")
    sentence = refused("discover", folder / "classes.txt", "--out", tmp_path / "mine.json", *few)
    assert "0 of 2 answers hold a usable sentence" in sentence
    assert not (tmp_path / "mine.json").exists()


def test_classes_come_from_a_job_or_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    text = (ROOT / "jobs" / "demo" / "job.toml").read_text()
    path.write_text(text.replace("[model]", "[model]\nclass_init = 7", 1))  # what else the job says is not read
    assert "class_init = 7" in path.read_text()
    classes, backbone = read_classes(path)
    assert (classes, backbone.kind) == (CLASSES, "embedded")
    classes, backbone = read_classes(ROOT / "jobs" / "voc2007" / "job.toml")
    assert (len(classes), backbone.architecture) == (20, "ViT-B-16")
    for text, says in [
        ("dog\n", "classes has 1 entries"),
        ("dog\ndog\n", "more than once"),
        ("cat\ndog\nCat\n", "lists 'cat' and 'Cat', which are one name but for capitals"),
        ("dog\na|b\n", "may not"),
        ("", "classes has 0 entries"),
    ]:
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    assert read_classes(tmp_path / "classes.txt")[0] == ("cat", "dog")
    for text, says in [("x", "is not TOML"), ("name = 'x'", "classes"), ("[backbone]\nkind = 'clip'", "kind")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_classes(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_classes(tmp_path / "none.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_classes(tmp_path / "classes.txt")


SITE = """
device = "cpu"
[data]
source = "scenes"
train = 10
[privacy]
dataset = "scenes"
units = 50
epsilon = 8.0
delta = 1e-5
ledger = "ledgers"
"""


def test_counts_are_released_once_they_are_agreed_to(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    site = load_site(tmp_path / "site.toml", "north")
    assert site.privacy
    create_ledger(site.privacy, "north", None)
    out = tmp_path / "north.json"
    plain = ("counts", tmp_path / "site.toml", "--classes", tmp_path / "classes.txt", "--name", "north")
    plain += ("--noise-multiplier", 2, "--out", out)
    assert "give --kit DIR, or --unsigned" in refused(*plain)
    assert "agree to that with --in-clear" in refused(*plain, "--unsigned")
    dry = fedmpt(*plain, "--unsigned", "--in-clear", "--dry-run")
    assert "Nothing was charged" in dry.output
    assert not out.exists()
    assert len(read_site_ledger(site.privacy, None)) == 1
    done = fedmpt(*plain, "--unsigned", "--in-clear")
    assert done.exit_code == 0, done.output
    assert "of 8" in done.output
    assert read_counts(out).noise_multiplier == 2
    assert len(read_site_ledger(site.privacy, None)) == 3
    assert "name a new file" in refused(*plain, "--unsigned", "--in-clear")
    assert len(read_site_ledger(replace(site.privacy), None)) == 3


def test_counts_steer_a_discovery(folder: Path, tmp_path: Path) -> None:
    numbers = {"schema": 1, "kind": "fedmpt co-occurrence counts", "site": "north", "classes": ["bus", "dog", "sofa"]}
    numbers |= {
        "counts": [0.0, 900.0, 0.0],
        "unit": "record",
        "max_norm": 1.0,
        "noise_multiplier": 2.0,
        "ledger": "c-1",
    }
    path = tmp_path / "north.json"
    path.write_text(json.dumps(numbers))
    result = fedmpt(*scorer(folder, tmp_path / "mine.json"), "--counts", path)
    assert result.exit_code == 0, result.output
    content = read_content(tmp_path / "mine.json")
    assert content["provenance"]["answers"]["data"][0]["labels"] == ["sofa", "bus"]
    assert content["provenance"]["counts"][0]["site"] == "north"
    assert "noisy counts" in content["provenance"]["note"]
    assert "are given twice" in refused(*scorer(folder, tmp_path / "two.json"), "--counts", path, "--counts", path)
