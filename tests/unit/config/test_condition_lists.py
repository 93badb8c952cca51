"""Condition lists: what ships, and every damaged list is refused by name."""

import json
from pathlib import Path

import pytest

from fedmpt_core.config.condition_lists import content_digest, load_conditions, preset_names

LISTS = {
    "released-5": ("color", "background", "scene type", "spatial layout", "pose"),
    "released-7": ("color", "background", "scene type", "spatial layout", "pose", "lighting", "object scale"),
    "paper-5": ("spatial layout", "object pose", "background", "lighting and weather", "object scale"),
}


def a_list(**changes: object) -> dict[str, object]:
    content: dict[str, object] = {
        "schema": 1,
        "name": "mine",
        "conditions": ["season", "time of day"],
        "provenance": {"model": "some model", "prompts": ["why?"], "answers": ["because"], "note": None},
        **changes,
    }
    return {"digest": content_digest(content), **content}


def write(folder: Path, content: object) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_presets() -> None:
    assert set(preset_names()) == {*LISTS, "voc2007-smollm2"}
    for name, words in LISTS.items():
        got = load_conditions(name)
        assert (got.name, got.conditions) == (name, words)
    assert len({load_conditions(name).digest for name in LISTS}) == len(LISTS)


def test_a_preset_s_digest_is_pinned() -> None:
    """Results name it; if this fails the list was changed and needs a new name."""
    assert load_conditions("released-5").digest == "48f856878c27673e20b24e56b584329b57f4c06f6b1b283320d22855d999a741"
    assert load_conditions("released-7").digest == "a135384542f7b14ac1c69d3475a223726ecf1ed2f244a406760be28d08ad82ae"
    assert load_conditions("paper-5").digest == "eaaca43dd7f305f66b439779484dbb373515ff0efa41961e268367d9554277bd"


def test_a_list_of_one_s_own(tmp_path: Path) -> None:
    path = write(tmp_path, a_list())
    got = load_conditions(path)
    assert got == load_conditions(str(path))
    assert got.conditions == ("season", "time of day")
    assert got.digest == a_list()["digest"]
    other = a_list(provenance={"model": "another", "prompts": None, "answers": None, "note": None})
    assert other["digest"] != got.digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**a_list(), "conditions": ["season", "weather"]}, "the list was changed after it was made"),
        ({**a_list(), "digest": 7}, "the list was changed"),
        (a_list(schema=3), "schema=3 is not supported: this release reads 1 to 2"),
        (a_list(schema="1"), "whole number 'schema'"),
        (a_list(conditions=[]), "at least one condition"),
        (a_list(conditions="pose"), "at least one condition"),
        (a_list(conditions=["pose", " "]), "condition ' '"),
        (a_list(conditions=["pose", 3]), "condition 3"),
        (a_list(conditions=["pose", "Pose"]), "conditions lists 'pose' and 'Pose', which are one name"),
        (a_list(name=""), "name=''"),
        (a_list(extra=1), "missing or unknown keys extra"),
        ({k: v for k, v in a_list().items() if k != "digest"}, "keys digest"),
        (a_list(provenance={"model": None}), "provenance must have exactly"),
        (a_list(provenance={"model": 1, "prompts": 2, "answers": 3, "note": 4}), "note=4: give words, or null"),
        ([1], "is not a condition list"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\x00", "is not JSON"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, content: object, says: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=says) as caught:
        load_conditions(path)
    assert str(path) in str(caught.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'released-6' is not known: use one of paper-5, released-5, released-7"):
        load_conditions("released-6")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_conditions(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no such file"):
        load_conditions("none.json")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load_conditions(tmp_path)
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load_conditions(tmp_path / "mine.json")
