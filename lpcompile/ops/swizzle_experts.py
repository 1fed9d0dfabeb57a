"""``swizzle`` of every expert's scales on its own: scales[E, R, C] -> flat[E, Rp * Cp], bytes."""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import swizzle
from lpcompile.ops.define import define, same_bits

kernel = swizzle.kernel
agrees = same_bits


def outputs(scales: Tensor) -> Tensor:
    return scales.new_empty((scales.shape[0], swizzle.outputs(scales[0]).shape[0]))


def reference(scales: Tensor) -> Tensor:
    flat = [swizzle.reference(one).view(torch.uint8) for one in scales]
    return torch.stack(flat).view(scales.dtype)


def launch(scales: Tensor) -> Tensor:
    return swizzle.fill(scales, outputs(scales))


op = define(
    "swizzle_experts(Tensor scales) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Any, ...]]:
    shapes = [(3, 128, 8), (2, 300, 37), (1, 1, 1), (4, 129, 4), (5, 640, 100), (2, 0, 8)]
    made = [torch.randint(256, s, device=device, dtype=torch.uint8) for s in shapes]
    transposed = made[1].transpose(1, 2)
    return [(s,) for s in made] + [(transposed,), (made[4].view(torch.float8_e4m3fn),)]
