"""The device that a site trains on."""

import platform

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
