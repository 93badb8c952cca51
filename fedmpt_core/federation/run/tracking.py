"""Round figures as scalars, for those who compare runs in TensorBoard or MLflow. Needs the extra `tracking`."""

import time
from collections.abc import Mapping
from contextlib import closing
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
        # made by protobuf when they are imported
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'fedmpt[tracking]'") from None

    with closing(EventFileWriter(str(folder))) as writer:
        for row in record["rounds"]:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
            writer.add_event(Event(step=row["round"], wall_time=time.time(), summary=Summary(value=values)))


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A round's figures by tag: every figure of the global model, gate weights, epsilon by site, time and bytes."""
    figures = {f"global/{k}": v for k, v in row.items() if isinstance(v, float) and k != "seconds"}
    figures |= {f"gate/{n}": weight for n, weight in enumerate(row.get("gate", []))}
    figures |= {f"epsilon/{site}": spent["epsilon"] for site, spent in row.get("privacy", {}).items()}
    return {**figures, "round/seconds": row["seconds"], "round/bytes_sent": float(sum(row["bytes_sent"].values()))}
