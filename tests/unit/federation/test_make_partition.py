"""What is clustered where sites are made by what pictures look like."""

import numpy as np
import torch

from fedmpt_core.federation.make_partition import mean_features


def test_a_record_s_vector_is_the_mean_of_its_patches() -> None:
    class Held:
        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def batch(self, rows: range) -> torch.Tensor:
            return self.values[list(rows)]

    values = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    means = mean_features(Held(values), batch_size=3)  # type: ignore[arg-type]
    np.testing.assert_allclose(means, values.mean(1).numpy(), rtol=1e-6)
