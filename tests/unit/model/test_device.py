"""A full device: smaller pieces, the same result, and a sentence when not even one record fits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import JobConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.federation.site.session import SiteRecords, SiteSession
from fedmpt_core.model.device import DeviceFull, PieceSize, in_pieces
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.training.evaluation import Split, score
from fedmpt_core.training.local import local_update
from tests.fakes import FakeBackbone, Table, training_records
from tests.settings import OPEN, POLICY, UNMASKED, UNPROTECTED
from tests.unit.privacy.test_private_update import KEY, RECORDS, setting, update


class Room:
    """A device with room for so many rows; counts how often it was full."""

    def __init__(self, rows: int) -> None:
        self.rows, self.full, self.seen = rows, 0, []

    def check(self, rows: int) -> None:
        if rows > self.rows:
            self.full += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(rows)


def test_pieces_shrink_and_cover_every_row_once() -> None:
    room, done = Room(3), list[int]()
    size = PieceSize(16)

    def work(start: int, stop: int) -> None:
        room.check(stop - start)
        done.extend(range(start, stop))

    in_pieces(20, size, work)
    assert done == list(range(20))
    assert size.rows == 2
    assert room.full == 3
    pieces = list[tuple[int, int]]()
    in_pieces(0, size, lambda a, b: pieces.append((a, b)))
    assert pieces == [(0, 0)]


def test_a_single_row_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(DeviceFull, match="device = 'cpu'"):
        in_pieces(4, PieceSize(4), lambda a, b: Room(0).check(b - a))


def test_other_errors_pass() -> None:
    def broken(start: int, stop: int) -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        in_pieces(4, PieceSize(4), broken)


@pytest.mark.parametrize("moment", ["gradients", "clipping"])
@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_private_round_is_the_same_on_a_device_with_little_room(
    monkeypatch: pytest.MonkeyPatch, moment: str, engine: str, grouped: bool
) -> None:
    """Noise, sample and all: a part that ran out of memory is in the sum once."""
    units = np.arange(RECORDS) // 4 if grouped else None
    wide = update(Keystream(KEY), units=units, engine=engine)
    room = Room(1)
    if moment == "gradients":
        real = GradientEngine.fill

        def fill(self: GradientEngine, parts: Any, count: int) -> None:
            parts = list(parts)
            real(self, parts, count)  # what it left behind must not count
            room.check(max((len(rows) for rows, _, _ in parts), default=0))

        monkeypatch.setattr(GradientEngine, "fill", fill)
    else:
        to_grid = torch.Tensor.round_

        def rounded(rows: torch.Tensor) -> torch.Tensor:
            room.check(len(rows))
            return to_grid(rows)

        monkeypatch.setattr(torch.Tensor, "round_", rounded)
    narrow = update(Keystream(KEY), units=units, engine=engine)
    assert room.full >= 1
    assert np.allclose(narrow.vector, wide.vector, atol=1e-6)
    assert np.abs(wide.vector).max() > 1e-3


def test_a_part_that_stays_in_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin of the test above: sums first, runs out of memory then."""
    wide = update(Keystream(KEY), engine="exact")
    room, real = Room(2), PrivateOptimizer.clip_and_accumulate

    def late(self: PrivateOptimizer) -> None:
        real(self)
        room.check(len(next(iter(self.private.values())).grad_sample))  # type: ignore[attr-defined]

    monkeypatch.setattr(PrivateOptimizer, "clip_and_accumulate", late)
    assert not np.allclose(update(Keystream(KEY), engine="exact").vector, wide.vector, atol=1e-3)


def plain(model: FedMPT, table: Table, targets: np.ndarray) -> Any:
    job, *_ = setting()
    training = TrainingConfig(rounds=4, local_steps=3, batch_size=8, learning_rate=0.5, momentum=0.0)
    return local_update(
        model,
        table,  # type: ignore[arg-type]
        targets,
        state=model.vector(),
        round_number=1,
        training=training,
        loss=job.loss,
        generator=np.random.default_rng(3),
    )


class Tight(Table):
    """Features on a device with little room."""

    def __init__(self, values: torch.Tensor, room: Room) -> None:
        super().__init__(values)
        self.room = room

    def batch(self, indices: Any) -> torch.Tensor:
        self.room.check(len(indices))
        return super().batch(indices)


def test_a_plain_round_is_the_same_on_a_device_with_little_room() -> None:
    _, model, table, targets = setting()
    start = model.vector()
    wide = plain(model, table, targets)
    model.load_vector(start)
    room = Room(3)

    narrow = plain(model, Tight(table.values, room), targets)
    assert room.full >= 1
    assert np.allclose(narrow.vector, wide.vector, atol=1e-6)
    assert narrow.losses == pytest.approx(wide.losses)


def test_scores_are_the_same_on_a_device_with_little_room() -> None:
    _, model, table, _ = setting()
    wide = score(model, table)  # type: ignore[arg-type]
    room = Room(2)
    narrow = score(model, Tight(table.values, room))  # type: ignore[arg-type]
    assert room.full >= 1
    assert np.allclose(narrow.probabilities, wide.probabilities, atol=1e-6)


class OnGpu(Table):
    """Features that no device takes but a CPU, for the session that holds them."""

    session: SiteSession

    def batch(self, indices: Any) -> torch.Tensor:
        if self.session.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().batch(indices)


def session(folder: Path, wish: str) -> tuple[SiteSession, np.ndarray]:
    """A prepared session with test records, and its parameters; this machine need not have the device it wishes for."""
    job = JobConfig("s", ("cat", "dog"), training=TrainingConfig(rounds=1), privacy=UNPROTECTED, secagg=UNMASKED)
    site = SiteConfig(DataConfig("scenes", evaluate=True), POLICY, OPEN, cache_dir=str(folder), device="cpu")
    one = SiteSession(job, site, "site-1", backbone=FakeBackbone())
    one.site = dataclasses.replace(site, device=wish)
    features, targets = OnGpu(torch.randn(4, 9, 16)), np.eye(4, 2, dtype=np.uint8)
    features.session = one
    train = training_records(Table(features.values), targets)
    ready = one.prepare(data=SiteRecords(train=train, test=Split(features, targets)))  # type: ignore[arg-type]
    return one, ready.initial


def test_a_site_that_leaves_us_the_choice_goes_on_with_its_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, state = session(tmp_path, "auto")
    one.device = torch.device("cuda")
    figures = one.evaluate(state)
    assert one.device.type == "cpu"
    assert "on the CPU from now on" in caplog.text
    assert figures == one.evaluate(state)


@pytest.mark.parametrize(("device", "wish"), [("cuda", "cuda"), ("cuda:0", "cuda:0")])
def test_a_site_that_chose_its_device_gets_the_sentence(tmp_path: Path, device: str, wish: str) -> None:
    one, state = session(tmp_path, wish)
    one.device = torch.device(device)
    with pytest.raises(DeviceFull):
        one.evaluate(state)
    assert str(one.device) == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_real_gpu_is_used_in_smaller_pieces() -> None:
    """Rows of a quarter of the memory that is free: one fits, eight do not."""
    free = torch.cuda.mem_get_info()[0]
    size, done = PieceSize(8), []

    def work(start: int, stop: int) -> None:
        rows = torch.empty(stop - start, free // 4, dtype=torch.uint8, device="cuda")
        done.append(int(rows.shape[0]))

    in_pieces(8, size, work)
    assert sum(done) == 8
    assert size.rows < 8
