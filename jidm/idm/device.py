"""Names of devices."""

from __future__ import annotations

import torch

from jidm.errors import InputError


def find_device(name: str | torch.device) -> torch.device:
    """A device of this machine by its name: cpu, cuda, cuda:1, ..., mps.

    Raises:
        InputError: torch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device '{name}' is unknown; choose cpu, cuda, cuda:1, ... or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            built = "" if torch.version.cuda else " (torch is a CPU build)"
            raise InputError(f"device '{name}': torch sees no CUDA device{built}; use cpu")
        if (device.index or 0) >= count:
            raise InputError(f"device '{name}': this machine has cuda:0 to cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device '{name}': torch sees no Apple GPU; use cpu")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device '{name}' is not supported; choose cpu, cuda, cuda:1, ... or mps")
    return device
