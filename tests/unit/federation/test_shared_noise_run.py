"""A whole run in which sites share the noise: it moves, both budgets are charged, the model follows from its sums."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.sums import check_sums
from fedmpt_core.benchmark.in_process import Federation
from fedmpt_core.config.federation import FederationConfig
from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.server_step import ServerStepConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.data.scenes import CLASSES
from fedmpt_core.federation.run.manifest import RunManifest
from fedmpt_core.federation.run.record import MODEL, save_model, sum_file
from fedmpt_core.federation.server.rounds import Rounds
from fedmpt_core.federation.site.session import SiteSession
from fedmpt_core.privacy.ledger.budget import history, resolved
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, read_site_ledger
from fedmpt_flare.server.run_folder import RunFolder
from tests.fakes import FakeBackbone

JOB = resolved(
    JobConfig(
        "shared",
        tuple(CLASSES),
        model=ModelConfig(conditions=("color", "pose")),
        training=TrainingConfig(rounds=3, local_steps=1),
        privacy=PrivacyConfig(noise="distributed", engine="exact", sample_rate=0.5, max_grad_norm=0.1),
        secagg=SecAggConfig(max_sites=3, max_weight=12, insecure_identities=True),
        federation=FederationConfig(weighting="records", evaluate_every=0),
        server=ServerStepConfig(learning_rate=2.0, momentum=0.5),
    )
)


def site(folder: Path, name: str) -> SiteConfig:
    policy = SitePrivacyConfig("s", 12, 50.0, 1e-5, ledger=str(folder / name), epsilon_alone=60.0)
    create_ledger(policy, name, None)
    return SiteConfig(DataConfig("scenes", train=12, val=0, test=0), privacy=policy, cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Federation, Rounds]:
    folder = tmp_path_factory.mktemp("shared")
    sites = {name: site(folder, name) for name in ("site-1", "site-2", "site-3")}
    sessions = {n: SiteSession(JOB, s, n, run_id="r", backbone=FakeBackbone()) for n, s in sites.items()}
    joined = {name: session.prepare() for name, session in sessions.items()}
    (out := folder / "run").mkdir()
    rounds = Rounds(JOB, "r", RunFolder(out, folder / "checkpoints"))
    rounds.join(joined)
    federation = Federation(JOB, sessions, joined)
    list(rounds.run(federation))
    rounds.end("completed")
    manifest = RunManifest.of(rounds.record, out, ledgers={}, kit=None)
    return Run(out, json.loads(json.dumps(asdict(rounds.record))), JOB, manifest), federation, rounds


def test_the_model_moves_and_both_budgets_are_charged(run: tuple[Run, Federation, Rounds]) -> None:
    _, federation, rounds = run
    assert np.abs(rounds.state - next(iter(rounds.sites.values())).initial).max() > 0
    for session in federation.sessions.values():
        assert session.site.privacy is not None
        charged = history(read_site_ledger(session.site.privacy, None))
        assert [(s.count, s.honest) for s in charged] == [(1, 2)] * 3


def test_an_audit_takes_every_step_again(run: tuple[Run, Federation, Rounds]) -> None:
    audited, _, rounds = run
    assert sum_file(3) in audited.manifest.files
    check_sums(audited, rounds.layout)
    assert audited.findings == []


@pytest.mark.parametrize("what", ["model", "sum", "missing", "weight", "order"])
def test_a_model_that_is_not_what_the_sums_make_it_is_found(
    run: tuple[Run, Federation, Rounds], what: str, tmp_path: Path
) -> None:
    audited, _, rounds = run
    copy = dataclasses.replace(audited, folder=tmp_path, findings=[], record=json.loads(json.dumps(audited.record)))
    for path in audited.folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(audited.folder)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(audited.folder)).write_bytes(path.read_bytes())
    first, second = (tmp_path / sum_file(number) for number in (1, 2))
    if what == "model":
        state = rounds.state.copy()
        state[0] += 1e-2
        (tmp_path / MODEL).write_bytes(save_model(rounds.layout, state))
    elif what == "sum":
        words = np.frombuffer(first.read_bytes(), "<u4").copy()
        words[:100] += np.uint32(2**20)
        first.write_bytes(words.tobytes())
    elif what == "missing":
        second.unlink()
    elif what == "weight":
        copy.record["sites"]["site-1"]["weight"] = 3
    else:
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
    check_sums(copy, rounds.layout)
    assert [f.code for f in copy.findings] == ["sums-missing" if what == "missing" else "model-not-of-the-sums"]
