"""``amax_group`` and ``amax_tensor_grouped`` of one read: x[T, C] bf16, offs[E] -> [E], [1] fp32.

The first after the Hadamard transform: what NVFP4 scales both copies of the tokens of experts by,
that which is contracted along tokens, group by group, and that along channels. Made by
``passes/pair_amax.py``. Kernel: ``amax_group``.
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import amax_group, amax_tensor_grouped
from lpcompile.ops.define import define, same_bits

kernel = amax_group.kernel


def outputs(x: Tensor, offs: Tensor, signs: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(offs.shape, dtype=torch.float32), x.new_empty((1,), dtype=torch.float32)


def reference(x: Tensor, offs: Tensor, signs: int) -> tuple[Tensor, Tensor]:
    return amax_group.reference(x, offs, signs), amax_tensor_grouped.reference(x, offs)


def launch(x: Tensor, offs: Tensor, signs: int) -> tuple[Tensor, Tensor]:
    made = outputs(x, offs, signs)
    torch._foreach_zero_(made)
    return amax_group.fill(x, offs, signs, *made)


op = define(
    "amax_group_both(Tensor x, Tensor offs, int signs) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    return [args for args in amax_group.samples(device) if args[2] is not None]
