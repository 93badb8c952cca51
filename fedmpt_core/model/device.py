"""Where and in what pieces things are computed: a site's device, and work cut so that it fits.

Other jobs share the device, so what fitted a minute ago may not fit now. A piece that ran out of memory must have left
nothing behind: what was summed up before it stays, and the piece alone is done again, with the same result.
"""

import platform
from collections.abc import Callable

import torch


def pick_device(wish: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises ValueError when a named device is missing."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={wish!r}: this machine shows {torch.cuda.device_count()} GPUs; use 'auto' or 'cpu'")
    return device


def device_name(device: torch.device) -> str:
    """What a result says of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


class DeviceFull(ValueError):
    """Not even one record fits."""


class PieceSize:
    """How many rows are worked on at once; only ever gets smaller.

    Attributes:
        rows: at least 1.
    """

    def __init__(self, rows: int) -> None:
        """Starts with so many."""
        self.rows = rows

    def shrink(self, tried: int) -> None:
        """Half of what was tried. Raises DeviceFull when that was one row already."""
        if self.rows == 1:
            raise DeviceFull(
                "the device has no memory for a single record: free it, or set device = 'cpu' in the site's file"
            )
        self.rows = max(1, min(self.rows, tried) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_pieces(count: int, size: PieceSize, work: Callable[[int, int], None]) -> None:
    """Do `work(start, stop)` on pieces of `count` rows, one after the other.

    Args:
        count: rows; with 0 there is one empty piece.
        size: rows at once; halved when the device is full.
        work: does a piece, and leaves nothing behind when it raises.

    Raises:
        DeviceFull: one row does not fit.
    """
    start = 0
    while True:
        stop = min(start + size.rows, count)
        # out of the handler before the next try: the exception holds on to the tensors of the failed one
        if _fits(work, start, stop):
            start = stop
            if start >= count:
                return
        else:
            size.shrink(stop - start)


def _fits(work: Callable[[int, int], None], start: int, stop: int) -> bool:
    try:
        work(start, stop)
    except torch.OutOfMemoryError:
        return False
    return True
