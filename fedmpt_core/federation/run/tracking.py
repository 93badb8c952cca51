"""Round figures as scalars, for those who compare runs in TensorBoard or MLflow. Needs the extra `tracking`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_tensorboard(record: Mapping[str, Any], folder: Path) -> None:
    """Write every scalar of every round, and each condition's gate weight, as one TensorBoard run.

    Args:
        record: a run's record in plain values (`result.json`).
        folder: TensorBoard's log folder for this run; made if missing.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'fedmpt[tracking]'") from None

    with SummaryWriter(str(folder)) as writer:
        for row in record["rounds"]:
            for tag, value in scalars(row).items():
                writer.add_scalar(tag, value, row["round"])


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A round's figures by tag: every figure of the global model, gate weights, epsilon by site, time and bytes."""
    found = {f"global/{k}": v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
    found |= {f"gate/{n}": weight for n, weight in enumerate(row.get("gate", []))}
    found |= {f"epsilon/{site}": said["epsilon"] for site, said in row.get("privacy", {}).items()}
    return {**found, "round/seconds": row["seconds"], "round/bytes_sent": float(sum(row["bytes_sent"].values()))}
