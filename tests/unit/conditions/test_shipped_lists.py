"""Lists of schema 2: what they add, for which labels they are, and the one that ships, against its own answers."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.conditions.discover import PROMPTS
from fedmpt_core.conditions.journal import unpacked
from fedmpt_core.conditions.ranking import rank, text_features
from fedmpt_core.conditions.sampling import label_sets
from fedmpt_core.conditions.scorer import load_lexicon, strengths
from fedmpt_core.config.condition_lists import ConditionSet, content_digest, load_conditions, preset_names, read_content
from fedmpt_core.data.public.voc import CLASSES
from fedmpt_core.model.backbone.embedded import EmbeddedBackbone

SHIPPED = "voc2007-smollm2"
PROVENANCE: dict[str, object] = {
    "model": {"name": "m", "weights": "0" * 64, "library": "l"},
    "method": "score",
    "settings": {"label_sets": 3, "seed": 0, "backbone": "b"},
    "prompts": {"scene": "A photo of {labels},"},
    "answers": {"form": "left out", "sha256": "0" * 64, "data": None},
    "ranking": [{"condition": "season", "coverage": 1, "visual": None, "closest": "", "cosine": 0.0, "kept": True}],
    "counts": None,
    "note": None,
}


def a_list(**changes: object) -> dict[str, object]:
    content: dict[str, object] = {
        "schema": 2,
        "name": "mine",
        "conditions": ["season", "time of day"],
        "classes": ["dog", "fox", "cat"],
        "provenance": PROVENANCE,
        **changes,
    }
    return {"digest": content_digest(content), **content}


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_schema_2_names_its_classes(tmp_path: Path) -> None:
    found = load_conditions(write(tmp_path, a_list()))
    assert found == ConditionSet("mine", ("season", "time of day"), str(a_list()["digest"]), ("dog", "fox", "cat"))
    free = load_conditions(write(tmp_path, a_list(classes=None)))
    assert free.classes == ()
    assert free.digest != found.digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**a_list(), "classes": ["dog"]}, "the list was changed after it was made"),
        (a_list(classes=[]), "give a list of at least one class"),
        (a_list(classes=["dog", "dog"]), "classes lists 'dog' more than once: classes must differ"),
        (a_list(classes=["dog", 3]), "class 3"),
        (a_list(schema=1), "missing or unknown keys classes"),
        (a_list(schema=3), "schema=3 is not supported: this release reads 1 to 2"),
        (a_list(schema=True), "whole number 'schema'"),
        (a_list(provenance={"model": None, "prompts": None, "answers": None, "note": None}), "provenance must have"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_conditions(write(tmp_path, content))


ROW = {"condition": "season", "coverage": 1.0, "visual": None, "closest": "", "cosine": 0.0, "kept": True}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", {}, r"mine.json: provenance.model.name: field required: this is not what `fedmpt conditions"),
        ("model", None, "provenance.model: input should be"),
        ("method", "guess", "provenance.method: input should be 'generate' or 'score'"),
        ("settings", {"label_sets": 3, "seed": 0}, "provenance.settings.backbone: field required"),
        ("settings", {"label_sets": "3", "seed": 0, "backbone": "b"}, "provenance.settings.label_sets"),
        ("answers", {"form": "plain", "data": []}, "provenance.answers.sha256"),
        ("answers", {"form": "rot13", "sha256": "0", "data": []}, "provenance.answers.form"),
        ("ranking", [ROW, {**ROW, "coverage": "much"}], "provenance.ranking.1.coverage"),
        ("ranking", [{**ROW, "visual": "none"}], "provenance.ranking.0.visual"),
        ("ranking", None, "provenance.ranking"),
        ("counts", 3, "provenance.counts"),
        ("note", ["by hand"], "provenance.note"),
    ],
)
def test_provenance_of_another_form_is_a_sentence_even_with_the_right_digest(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        read_content(write(tmp_path, a_list(provenance={**PROVENANCE, key: value})))


def test_a_list_is_for_the_classes_it_was_found_for_and_part_of_them() -> None:
    found = ConditionSet("mine", ("season",), "", ("dog", "cat", "bus"))
    found.check_classes(["dog", "cat", "bus"])
    found.check_classes(["bus", "dog"])
    ConditionSet("any", ("season",), "").check_classes(["whale"])
    with pytest.raises(
        ValueError, match=r"found for 3 other classes, among which 'whale' is not.*conditions = \[\"sea"
    ):
        found.check_classes(["dog", "whale"])
    with pytest.raises(ValueError, match="'a', 'b', 'c' and 2 more is not"):
        found.check_classes(["a", "b", "c", "d", "e"])


def test_the_lexicon_is_no_list() -> None:
    assert "lexicon" not in preset_names()


def test_the_shipped_list_is_what_its_answers_say() -> None:
    """Every step behind the model's answers, done again: label sets, scores, text features, ranking."""
    content = read_content(SHIPPED)
    provenance = content["provenance"]
    settings, lexicon, backbone = provenance["settings"], load_lexicon(), EmbeddedBackbone()
    assert tuple(content["classes"]) == CLASSES
    assert settings["lexicon"]["digest"] == lexicon.digest
    assert settings["backbone_digest"] == backbone.digest()
    assert provenance["prompts"] == PROMPTS["score"]
    assert provenance["counts"] is None
    raw = unpacked(provenance["answers"])
    assert raw is not None
    sets = label_sets(len(CLASSES), settings["budget"], settings["seed"])
    assert [[CLASSES[c] for c in labels] for labels in sets] == [r["labels"] for r in raw]
    table = np.array([[float(p) for p in r["answer"].split()] for r in raw])
    candidates = tuple(lexicon.values)
    found = rank(
        candidates,
        strengths(table, lexicon),
        text_features(backbone, candidates),
        count=settings["conditions"],
        most_cosine=settings["most_cosine"],
    )
    assert [c.condition for c in found] == [row["condition"] for row in provenance["ranking"]]
    assert [c.condition for c in found if c.kept] == content["conditions"]
    assert np.allclose([c.coverage for c in found], [row["coverage"] for row in provenance["ranking"]], atol=1e-6)


def test_the_shipped_list_has_the_names_of_the_job_in_its_order() -> None:
    """What docs/conditions.md says of the file of class names."""
    job = tomllib.loads((Path(__file__).parents[3] / "jobs" / "voc2007" / "job.toml").read_text())
    assert read_content(SHIPPED)["classes"] == job["classes"]


def test_the_shipped_list_is_small_enough_to_keep() -> None:
    path = Path(__file__).parents[3] / "fedmpt_core" / "config" / "lists" / f"{SHIPPED}.json"
    assert path.stat().st_size < 150_000
