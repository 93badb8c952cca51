"""Names that people or towers take for one: refused or warned of by one rule, wherever names stand."""

from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.common.text import alike, likeness
from fedmpt_core.config.condition_lists import check_words
from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.config.toml import ConfigError, load_sites
from fedmpt_core.data.pictures import Dataset, FilePicture
from fedmpt_core.federation import preflight
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.roster import Member, Roster
from tests.fakes import FakeBackbone
from tests.settings import UNPROTECTED

TWINS = {
    "capitals": ("Cat", "cat"),
    "two blanks": ("potted plant", "potted  plant"),
    "composed or not": ("Caf\u00e9", "Cafe\u0301"),
    "underscore": ("potted_plant", "potted plant"),
    "hyphen": ("X-ray", "x ray"),
    "another hyphen": ("x\u2010ray", "x\u2013ray"),
    "full width": ("\uff23\uff34", "CT"),
    "ligature": ("\ufb01brosis", "fibrosis"),
    "sharp s": ("STRASSE", "stra\u00dfe"),
    "no-break space": ("chest\u00a0drain", "chest drain"),
    "invisible": ("tu\u00admor", "tumor"),
    "superscript": ("m\u00b2", "m2"),
    "kelvin": ("\u212a", "k"),
    "the same": ("dog", "dog"),
}
DIFFERENT = ("cat", "cats", "x.ray", "xray", "C", "C++", "1/2", "12", "naïve", "naive")


@pytest.mark.parametrize("kind", TWINS)
def test_twins_are_refused_wherever_names_are_listed(tmp_path: Path, kind: str) -> None:
    one, other = TWINS[kind]
    assert likeness(one) == likeness(other)
    with pytest.raises(ValueError, match=r"classes.*(one name but for|more than once)"):
        JobConfig("j", classes=(one, "bus", other))
    with pytest.raises(ValueError, match=r"unseen_classes.*(one name but for|more than once)"):
        JobConfig("j", (one, "bus"), unseen_classes=(other,))
    with pytest.raises(ValueError, match=r"unseen_classes.*(one name but for|more than once)"):
        JobConfig("j", ("bus", "car"), unseen_classes=(one, other))
    with pytest.raises(ValueError, match=r"conditions.*(one name but for|more than once)"):
        ModelConfig(conditions=(one, "pose", other))
    for what in ("class", "condition", "value"):
        with pytest.raises(ValueError, match=r"list.json: .* must differ"):
            check_words("list.json", what, [one, "pose", other])
    with pytest.raises(ValueError, match="given twice"):
        Dataset((one, other), (), np.zeros((0, 2)))


def test_other_names_may_stand_together() -> None:
    assert alike(DIFFERENT) == ""
    assert JobConfig("j", DIFFERENT).classes == DIFFERENT


@pytest.mark.parametrize("kind", ["capitals", "composed or not"])
def test_a_refusal_shows_how_the_names_differ(kind: str) -> None:
    shown = alike(TWINS[kind])
    assert shown.startswith("'Cat' and 'cat'" if kind == "capitals" else r"'Caf\xe9' and 'Cafe\u0301'")


def test_groups_are_one_by_the_same_rule(tmp_path: Path) -> None:
    for kind, (one, other) in TWINS.items():
        rows = Dataset(("c",), (FilePicture("a"), FilePicture("b")), np.zeros((2, 1), int), groups=(one, other))
        assert rows.groups is not None and len(set(rows.groups)) == 1, kind


def test_sites_are_told_apart_by_the_same_rule(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('[sites.Hospital-A]\ndata.source = "scenes"\n[sites.hospital_a]\ndata.source = "scenes"\n')
    with pytest.raises(ConfigError, match=r"'Hospital-A' and 'hospital_a', which are one name .*: give every site"):
        load_sites(path)
    members = {name: Member(bytes([k]) * 32, "org") for k, name in enumerate(("site-1", "Site 1", "site-2"))}
    with pytest.raises(SecAggError, match=r"the roster lists 'site-1' and 'Site 1', which are one name"):
        Roster(bytes(32), members)


def test_words_that_the_towers_cannot_tell_apart_are_warned_of() -> None:
    backbone = FakeBackbone()  # its word pieces leave out blanks and underscores are signs; only letters count
    job = JobConfig(
        "j", ("x.ray", "x .ray", "dog"), privacy=UNPROTECTED, model=ModelConfig(conditions=("colour", "pose"))
    )
    size = preflight.check_model(job, backbone)
    assert [s.split(",")[0] for s in size.indistinct] == [
        "class 'x.ray' and 'x .ray' have the same word pieces in fake towers"
    ]
    assert preflight.warnings_of(job, size, {})[0] == size.indistinct[0]


class Deaf(FakeBackbone):
    """Does not hear what stands behind the third piece of a word."""

    def encode_prompts(self, prefixes, suffixes):  # type: ignore[no-untyped-def]
        return super().encode_prompts(prefixes, [s[:3] for s in suffixes])


def test_equal_text_features_of_different_words_are_warned_of() -> None:
    job = JobConfig(
        "j",
        ("a b c d", "a b c e", "dog"),
        unseen_classes=("a b c f",),
        privacy=UNPROTECTED,
        model=ModelConfig(conditions=("pose", "color")),
    )
    sentences = preflight.check_model(job, Deaf()).indistinct
    assert len(sentences) == 3 and all("the same text features in fake towers" in s for s in sentences)


def test_the_embedded_towers_tell_ordinary_words_apart() -> None:
    job = JobConfig(
        "j",
        ("cat", "dog", "potted plant", "plant"),
        privacy=UNPROTECTED,
        model=ModelConfig(conditions=("color", "pose")),
    )
    assert preflight.check_model(job, load_backbone(job.backbone)).indistinct == ()
