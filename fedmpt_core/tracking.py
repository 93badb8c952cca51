"""Round figures as TensorBoard scalars, for those who compare runs there. Needs the extra `tracking`."""

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
            for key, value in row.items():
                if isinstance(value, float) and key != "seconds":
                    writer.add_scalar(f"global/{key}", value, row["round"])
            for n, weight in enumerate(row.get("gate", [])):
                writer.add_scalar(f"gate/{n}", weight, row["round"])
            for site, said in row.get("privacy", {}).items():
                writer.add_scalar(f"epsilon/{site}", said["epsilon"], row["round"])
            writer.add_scalar("round/seconds", row["seconds"], row["round"])
            writer.add_scalar("round/bytes_sent", sum(row["bytes_sent"].values()), row["round"])
