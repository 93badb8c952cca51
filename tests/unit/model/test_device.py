"""A full device: smaller pieces, the same result, and a sentence when not even one record fits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import TrainingConfig
from fedmpt_core.federation.site.session import SiteSession
from fedmpt_core.model.device import DeviceFull, PieceSize, in_pieces
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.training.evaluation import score
from fedmpt_core.training.local import local_update
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import Table
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
        clip = torch.linalg.vector_norm

        def norm(rows: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            if rows.dtype == torch.float64 and options == {"dim": 1}:
                room.check(len(rows))
            return clip(rows, *rest, **options)

        monkeypatch.setattr(torch.linalg, "vector_norm", norm)
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


def test_a_plain_round_is_the_same_on_a_device_with_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, table, targets = setting()
    start = model.vector()
    wide = plain(model, table, targets)
    model.load_vector(start)
    room = Room(3)

    def loss(positive: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        room.check(len(positive))
        return asymmetric_loss(positive, *rest, **options)

    monkeypatch.setattr("fedmpt_core.training.local.asymmetric_loss", loss)
    narrow = plain(model, table, targets)
    assert room.full >= 1
    assert np.allclose(narrow.vector, wide.vector, atol=1e-6)
    assert narrow.losses == pytest.approx(wide.losses)


def test_scores_are_the_same_on_a_device_with_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, table, _ = setting()
    wide = score(model, table)  # type: ignore[arg-type]
    room, forward = Room(2), FedMPT.forward

    def checked(self: FedMPT, patches: torch.Tensor, *rest: Any) -> Any:
        room.check(len(patches))
        return forward(self, patches, *rest)

    monkeypatch.setattr(FedMPT, "forward", checked)
    narrow = score(model, table)  # type: ignore[arg-type]
    assert room.full >= 1
    assert np.allclose(narrow.probabilities, wide.probabilities, atol=1e-6)


class Movable:
    def __init__(self) -> None:
        self.device = "cuda"

    def to(self, device: torch.device) -> "Movable":
        self.device = str(device)
        return self


def with_room(device: str, wish: str, work: Callable[[SiteSession], Any]) -> tuple[SiteSession, Any]:
    session = object.__new__(SiteSession)
    session.device = torch.device(device)
    session.backbone = session.model = Movable()  # type: ignore[assignment]
    session._judge = Movable()  # type: ignore[assignment]
    session.site = type("Site", (), {"device": wish})()  # type: ignore[assignment]
    return session, session._with_room(lambda: work(session))


def test_a_site_that_leaves_us_the_choice_goes_on_with_its_cpu(caplog: pytest.LogCaptureFixture) -> None:
    def work(session: SiteSession) -> str:
        if session.device.type != "cpu":
            raise DeviceFull("full")
        return session.model.device  # type: ignore[return-value]

    session, found = with_room("cuda", "auto", work)
    assert (found, session.device.type, session._judge.device) == ("cpu", "cpu", "cpu")
    assert "on the CPU from now on" in caplog.text


@pytest.mark.parametrize(("device", "wish"), [("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cpu", "auto")])
def test_a_site_that_chose_its_device_gets_the_sentence(device: str, wish: str) -> None:
    def work(session: SiteSession) -> None:
        raise DeviceFull("full")

    with pytest.raises(DeviceFull):
        with_room(device, wish, work)


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
