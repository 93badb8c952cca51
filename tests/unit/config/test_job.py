"""Jobs and sites: every wrong key, type and value is named; what is read is what was written."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.config.job import JobConfig, LossConfig, ModelConfig, TrainingConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict, load_job, load_site, load_sites

JOB = 'name = "small"\nclasses = ["cat", "dog"]\n'
SITES = """
[defaults.data]
source = "scenes"
test = 5
[sites.site-1]
[sites.site-2.data]
evaluate = true
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, "job.toml", JOB))
    assert (job.model.condition_tokens, job.model.class_tokens, job.model.adapter_width) == (4, 4, 32)
    assert (job.loss.gamma_negative, job.loss.gamma_positive, job.loss.margin) == (2, 1, 0.05)
    assert (job.training.optimizer, job.training.learning_rate) == ("sgd", 0.001)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            "[training]\nlerning_rate = 0.1\n",
            r"\[training\] unknown key 'lerning_rate': did you mean 'learning_rate'",
        ),
        (
            "[privacy]\nmicro_batch = 64\n",
            r"\[privacy\] unknown key 'micro_batch': .* each site sets it .* top of a site's file, beside 'device'",
        ),
        ("sead = 3\n", "unknown key 'sead': did you mean 'seed'"),
        ("[modell]\nreg = 1.0\n", "unknown key 'modell': did you mean 'model'"),
        ('[training]\nrounds = "3"\n', r"\[training\] rounds='3'.*integer"),
        ("[training]\nrounds = true\n", r"\[training\] rounds=True"),
        ("[training]\nrounds = 0\n", r"\[training\] rounds=0 is out of range: allowed is \[1, 100000\]"),
        ("[training]\nlearning_rate = nan\n", "finite"),
        ("[training]\nlearning_rate = 0.0\n", r"learning_rate=0.0 is out of range: allowed is \(0"),
        ('[training]\noptimizer = "sdg"\n', r"\[training\] optimizer='sdg'.*'sgd' or 'adam'"),
        ("[model]\nreg = 0.0001\n", "reg=0.0001 is out of range"),
        ('[model]\nconditions = "released-6"\n', r"\[model\] conditions: .*released-6"),
        ("[model]\nconditions = []\n", r"\[model\] conditions has 0 entries: give 1 or more"),
        ('[model]\nconditions = [" "]\n', r"\[model\] conditions\[0\]=' ': name a condition"),
        ('[model]\nconditions = ["pose", "pose"]\n', "'pose' more than once"),
        (
            '[model]\ncomponents = ["transprot"]\n',
            r"\[model\] components\[0\]='transprot': input should be 'prompts', 'adapters'",
        ),
        ("[training.group_rates]\nhaed = 1.0\n", r"\[training.group_rates\] unknown key 'haed': did you mean 'head'"),
        ("[training.group_rates]\nhead = 0.0\n", r"\[training.group_rates\] head=0.0 is out of range"),
        ('[backbone]\nkind = "open_clip"\n', "architecture='' : name an open_clip architecture"),
        ("[backbone]\nimage_size = 100\n", r"\[backbone\] image_size=100: input should be a multiple of 32"),
        ('[backbone]\nweights = "openai"\n', "the embedded stand-in takes neither"),
        ("[loss]\ngamma_negative = 0.5\n", "gamma_negative=0.5 is below gamma_positive=1.0"),
        ("schema = 2\n", "schema=2 is not supported"),
        ("seed = -1\n", "seed=-1 is out of range"),
    ],
)
def test_a_wrong_job_names_section_key_and_value(tmp_path: Path, extra: str, says: str) -> None:
    path = write(tmp_path, "job.toml", JOB + extra)
    with pytest.raises(ConfigError, match=says) as caught:
        load_job(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('classes = ["a", "b"]', "'name' is missing"),
        ('name = "a b"\nclasses = ["a", "b"]', "name='a b'"),
        ('name = "x"\nclasses = ["a"]', "classes has 1 entries"),
        ('name = "x"\nclasses = ["a", "a"]', "'a' more than once"),
        ('name = "x"\nclasses = ["a", "b|c"]', r"'b\|c'"),
        ('name = "x"\nclasses = ["a", ""]', "a label may not be empty"),
        ("name = ", "is not TOML"),
        ("name = [1]\nclasses = 3", "classes"),
    ],
)
def test_a_wrong_head_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_job(write(tmp_path, "job.toml", text))


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "job.toml", JOB + "[training]\nround = 3\nbatchsize = 2\n")
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert "'round'" in str(caught.value)
    assert "'batchsize'" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load_job(tmp_path / "nowhere.toml")


def test_conditions_may_be_a_preset_a_list_or_a_file_beside_the_job(tmp_path: Path) -> None:
    preset = load_job(write(tmp_path, "a.toml", JOB + '[model]\nconditions = "released-7"\n'))
    listed = load_job(write(tmp_path, "b.toml", JOB + '[model]\nconditions = ["light", "season of year"]\n'))
    assert len(preset.model.conditions) == 7
    assert listed.model.conditions == ("light", "season of year")


def test_conditions_that_were_found_for_other_classes_are_refused(tmp_path: Path) -> None:
    found = '[model]\nconditions = "voc2007-smollm2"\n'
    voc = load_job(write(tmp_path, "a.toml", 'name = "x"\nclasses = ["dog", "tv monitor"]\n' + found))
    assert len(voc.model.conditions) == 5
    with pytest.raises(ConfigError, match=r"\[model\] conditions: .* were found for 20 other classes"):
        load_job(write(tmp_path, "b.toml", 'name = "x"\nclasses = ["dog", "whale"]\n' + found))
    with pytest.raises(ConfigError, match="classes"):
        load_job(write(tmp_path, "c.toml", 'name = "x"\nclasses = 3\n' + found))


def test_the_seed_of_the_command_line_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "job.toml", JOB + "seed = 3\n")
    assert load_job(path).seed == 3
    assert load_job(path, seed=8).seed == 8


@given(
    seed=st.integers(0, 2**32 - 1),
    reg=st.floats(0.005, 10),
    rounds=st.integers(1, 1000),
    steps=st.none() | st.integers(1, 50),
    classes=st.lists(st.from_regex(r"[a-z]{1,8}( [a-z]{1,8})?", fullmatch=True), min_size=2, max_size=6, unique=True),
)
def test_a_job_survives_its_plain_form(
    seed: int, reg: float, rounds: int, steps: int | None, classes: list[str]
) -> None:
    job = JobConfig(
        "p",
        tuple(classes),
        seed,
        model=ModelConfig(reg=reg),
        training=TrainingConfig(rounds=rounds, local_steps=steps),
    )
    again = job_from_dict(json.loads(json.dumps(job.to_dict())))
    assert again == job
    assert again.digest() == job.digest()


@pytest.mark.parametrize("change", [{"seed": 1}, {"classes": ("dog", "cat")}, {"loss": LossConfig(margin=0.1)}])
def test_the_digest_sees_every_change(change: dict[str, object]) -> None:
    job = JobConfig("small", ("cat", "dog"))
    assert dataclasses.replace(job, **change).digest() != job.digest()  # type: ignore[arg-type]


def test_sites_inherit_defaults_and_take_their_position_as_share(tmp_path: Path) -> None:
    sites = load_sites(write(tmp_path, "site.toml", SITES))
    assert list(sites) == ["site-1", "site-2"]
    assert [s.data.share for s in sites.values()] == [1, 2]
    assert [s.data.shares for s in sites.values()] == [2, 2]
    assert [s.data.evaluate for s in sites.values()] == [False, True]
    assert [s.data.test for s in sites.values()] == [5, 5]


def test_paths_of_a_site_start_at_its_file(tmp_path: Path) -> None:
    text = 'cache_dir = "cache"\n[data]\npath = "pictures/manifest.csv"\n'
    site = load_site(write(tmp_path, "fedmpt_site.toml", text), "hospital-a")
    assert site.data.path == str(tmp_path / "pictures" / "manifest.csv")
    assert site.cache == tmp_path / "cache"
    assert dataclasses.replace(site, cache_dir="").cache == Path.home() / ".cache" / "fedmpt" / "features"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sites]\n", r"no \[sites.NAME\] table"),
        ("[site.a]\n", "unknown table 'site'"),
        ("[sites.a]\n[sites.a.data]\nsource = 'scene'\n", "sites.a.*source='scene'"),
        ("[sites.a]\n[sites.a.data]\nsource = 'manifest'\n", "source='manifest' needs the path"),
        ("[sites.a]\n", "'data' is missing"),
        ("[sites.'a/b']\n", "site name 'a/b'"),
        ("[sites.a]\ndevice = 'gpu'\n[sites.a.data]\nsource='scenes'\n", "device='gpu'"),
        (
            "[sites.a]\n[sites.a.data]\nsource='scenes'\nshare=3\nshares=2\n",
            "share=3 is not one of the 2 shares",
        ),
        ("[sites.a]\n[sites.a.data]\nsource='scenes'\nspurious_strength=1.5\n", "spurious_strength=1.5"),
    ],
)
def test_a_wrong_site_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_sites(write(tmp_path, "site.toml", text))


def test_a_simulated_site_that_the_file_does_not_name(tmp_path: Path) -> None:
    path = write(tmp_path, "site.toml", SITES)
    with pytest.raises(ConfigError, match=r"no table \[sites.site-9\]"):
        load_site(path, "site-9")


def test_a_data_set_is_shared_out_by_position_and_a_manifest_when_asked(tmp_path: Path) -> None:
    text = '[defaults.data]\nsource = "{0}"\npath = "m.csv"\npartition_file = "p.json"\n{1}\n[sites.a]\n[sites.b]\n'
    for source in ("voc2007", "coco2014", "nuswide", "objects365", "multiscene", "mlrsnet"):
        sites = load_sites(write(tmp_path, "site.toml", text.format(source, "")))
        assert [(s.data.share, s.data.shares) for s in sites.values()] == [(1, 2), (2, 2)]
    for more, shares in (("", [(1, 1), (1, 1)]), ("shares = 2", [(1, 2), (2, 2)])):
        sites = load_sites(write(tmp_path, "site.toml", text.format("manifest", more)))
        assert [(s.data.share, s.data.shares) for s in sites.values()] == shares
    assert sites["a"].data.partition_file == str(tmp_path / "p.json")


@pytest.mark.parametrize(("unseen", "says"), [(["cat"], "none of them in classes"), (["x", "x"], "more than once")])
def test_unseen_classes_are_others(unseen: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        job_from_dict({"name": "j", "classes": ["cat", "dog"], "unseen_classes": unseen})
