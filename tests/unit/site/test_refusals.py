"""The site's own list of what it refused: whole sentences, for its custodian alone, never without an end."""

import stat
from multiprocessing import get_context
from pathlib import Path

from fedmpt_flare.site.refusals import note_refusal


def test_a_line_is_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "refusals.log").write_text("")
    (tmp_path / "refusals.log").chmod(0o644)  # whoever made it otherwise
    note_refusal(tmp_path, "job-1", "deployment", "data set 'ward-7'\nwould reach\x1b[2J epsilon 7.5")
    note_refusal(tmp_path, "job-2", "train", ValueError("/srv/pictures/a.png: no such file"))
    first, second = (tmp_path / "refusals.log").read_text().splitlines()
    assert first.split(" ", 1)[1] == "job-1 deployment: data set 'ward-7' would reach\ufffd[2J epsilon 7.5"
    assert second.endswith(" job-2 train: /srv/pictures/a.png: no such file")
    assert stat.S_IMODE((tmp_path / "refusals.log").stat().st_mode) == 0o600


def test_the_list_has_an_end_and_the_newest_is_in_it(tmp_path: Path) -> None:
    for old in ("older", "old"):
        (tmp_path / "refusals.log").write_text(f"{old} " + "x" * (1 << 20))
        note_refusal(tmp_path, f"after-{old}", "train", "x" * 1_000_000)
    log, before = tmp_path / "refusals.log", tmp_path / "refusals.log.1"
    assert sorted(tmp_path.iterdir()) == [log, before]
    assert log.read_text().split()[1] == "after-old"
    assert log.stat().st_size < 5000
    assert before.read_text().startswith("old ")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (log, before)} == {0o600}


def _many(folder: Path, who: int) -> None:
    for number in range(50):
        note_refusal(folder, f"job-{who}-{number}", "train", "a sentence")


def test_the_site_and_its_jobs_write_side_by_side(tmp_path: Path) -> None:
    workers = [get_context("fork").Process(target=_many, args=(tmp_path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = (tmp_path / "refusals.log").read_text().splitlines()
    assert len(lines) == len({line.split()[1] for line in lines}) == 150


def test_where_it_cannot_be_written_the_refusal_stands(tmp_path: Path) -> None:
    (tmp_path / "refusals.log").mkdir()
    note_refusal(tmp_path, "job-1", "train", "a sentence")
    note_refusal(tmp_path / "nowhere", "job-1", "train", "a sentence")
    assert list((tmp_path / "refusals.log").iterdir()) == []
