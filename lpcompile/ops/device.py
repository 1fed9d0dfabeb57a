"""What kernels ask of the device of a tensor, once: torch looks it up in 2 to 4 us every time."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the device of x."""
    return _capability(x.device)


def processors(x: Tensor) -> int:
    """How many multiprocessors the device of x has."""
    return _processors(x.device)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may have there."""
    return _shared_memory(x.device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
