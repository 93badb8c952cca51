"""What a GPU must do like a CPU; needs one."""

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.private_update import private_update
from tests.fakes import FakeBackbone, training_records
from tests.unit.model.test_device import plain
from tests.unit.privacy.test_private_update import CLASSES, KEY, RECORDS, setting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize("micro_batch", [64, 3])
def test_a_private_round_is_the_cpu_s(engine: Any, micro_batch: int) -> None:
    found = []
    for device in ("cpu", "cuda"):
        job, model, table, targets = setting(engine=engine)
        model = model.to(device)
        update = private_update(
            model,
            training_records(table, targets),
            state=model.vector(),
            round_number=1,
            job=job,
            mechanism=Mechanism.of(job),
            declared_units=RECORDS,
            keystream=Keystream(KEY),
            micro_batch=micro_batch,
        )
        found.append(update.vector)
    # the noise is drawn on the CPU, so it is the same
    assert np.allclose(*found, rtol=1e-3, atol=1e-4)


def test_a_plain_round_is_the_cpu_s() -> None:
    found = []
    for device in ("cpu", "cuda"):
        _, model, table, targets = setting()
        found.append(plain(model.to(device), table, targets).vector)
    assert np.allclose(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", get_args(get_type_hints(ModelConfig)["method"]))
def test_every_method_predicts_on_a_gpu_what_it_predicts_on_a_cpu(method: Any) -> None:
    patches, found = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0)), []
    short: Any = {"context_tokens": 4} if method == "released" else {}  # what the fake's text tower reads
    for device in ("cpu", "cuda"):
        backbone = FakeBackbone().to(device)  # as a site has it: the towers are there before the model is built
        model = build_model(backbone, CLASSES, ModelConfig(method=method, **short), 0).to(device)
        found.append(model(patches.to(device)).probabilities.detach().cpu().numpy())
    assert np.allclose(*found, rtol=1e-4, atol=1e-5)
