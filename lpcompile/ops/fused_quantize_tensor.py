"""Amax and quantize in one read: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scale[1], amax[1].

Of x[E, R, C], the weights of experts: values[E, R, Cp], scale[E], amax[E]. The bits are those of
``amax_tensor`` and ``quantize_fp8_tensor``. Made by ``passes/fuse_columns.py``.

Programs that share a matrix hold it in their registers: each reads its part, takes its maximum, and
waits for the others', while those of other matrices read or write. All programs of a launch must
run at once, or they would wait for what never starts: the launch is cooperative, which the driver
refuses where they cannot. A matrix that does not leave room for a second is read twice, as before.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_tensor, fp8, quantize_fp8_tensor
from lpcompile.ops.define import ALIGN, define, same_bits
from lpcompile.ops.fused_source import ELEMENTS

# Elements that a program holds, its warps, and how many of it a multiprocessor runs at once.
PART, WARPS, RESIDENT = 16384, 4, 4
REGISTERS = 65536  # of a multiprocessor
LARGEST = 2**22  # elements of a matrix, of which 132 multiprocessors hold two
_NAMES = {element: name for name, element in ELEMENTS.items()}


def fits(R: int, C: int) -> bool:
    """Whether one read of a matrix is what the kernel is for."""
    return C % ALIGN == 0 and 0 < R * C <= LARGEST


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_tensor.outputs(x)
    return (*quantize_fp8_tensor.outputs(x, amax, element, pow2), amax)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_tensor.reference(x)
    return (*quantize_fp8_tensor.reference(x, amax, element, pow2), amax)


@triton.jit
def kernel(
    x_ptr,  # words of two elements
    values_ptr,
    scales_ptr,
    amax_ptr,
    arrived_ptr,
    E,
    n,  # words of a matrix
    SHARE,  # programs that share a matrix
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
):
    part = tl.program_id(0) % SHARE
    at = part * PART + tl.arange(0, PART)
    for e in range(tl.program_id(0) // SHARE, E, tl.num_programs(0) // SHARE):
        to = tl.cast(e, tl.int64) * n + at
        x = tl.load(x_ptr + to) if EVEN else tl.load(x_ptr + to, mask=at < n, other=0)
        # Magnitudes of bf16 are in the order of their bits, NaN above Inf above all. Kept as words
        # they take half the registers that fp32 would.
        best = tl.maximum(tl.max(x & 0x7FFF, 0) << 16, tl.max(x & 0x7FFF0000, 0))
        best = tl.where(best > 0x7F800000, 0x7FC00000, best)
        tl.atomic_max(amax_ptr + e, best, sem="relaxed")
        tl.atomic_add(arrived_ptr + e, 1, sem="release")
        while tl.atomic_add(arrived_ptr + e, 0, sem="acquire") < SHARE:
            pass
        amax = tl.load(amax_ptr + e, volatile=True).to(tl.float32, bitcast=True)
        scale = fp8.encode(amax, LIMIT, POW2)
        low = (x << 16).to(tl.float32, bitcast=True) * scale
        high = (x & -65536).to(tl.float32, bitcast=True) * scale
        narrow = fp8.narrow2(low, high, ELEMENT)
        if EVEN:
            tl.store(values_ptr + to, narrow)
        else:
            tl.store(values_ptr + to, narrow, mask=at < n)
        if part == 0:
            tl.store(scales_ptr + e, fp8.decode(scale))


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    experts = fp8.stack(x)
    E, R, C = experts.shape
    most = RESIDENT * torch.cuda.get_device_properties(x.device).multi_processor_count
    share = triton.cdiv(R * C, PART)
    words = experts.is_contiguous() and x.data_ptr() % ALIGN == 0
    if not (fits(R, C) and words and share <= most):
        amax = amax_tensor.launch(x)
        return (*quantize_fp8_tensor.launch(x, amax, element, pow2), amax)
    values, scales, _ = outputs(x, element, pow2)
    zeros = torch.zeros((2, E), dtype=torch.int32, device=x.device)
    amax, arrived = zeros
    kernel[(share * min(E, most // share),)](
        experts.view(torch.int32), values.view(torch.int16), scales, amax, arrived,
        E, R * C // 2, share, fp8.MAX[element], pow2, _NAMES[element], PART // 2,
        R * C % PART == 0, num_warps=WARPS, maxnreg=REGISTERS // (RESIDENT * WARPS * 32),
        launch_cooperative_grid=True,
    )  # fmt: skip
    return values, scales, amax.view(torch.float32)


op = define(
    "fused_quantize_tensor(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    """Matrices that programs share and do not, whole parts and not; more than programs; in strides.

    Some hold what is not finite.
    """
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x = randn(64, 96)
    bad, worse = x.clone(), x * -1
    bad[3, 5], worse[63, 94], worse[0, 1] = -torch.inf, torch.nan, torch.inf
    few = torch.stack([x, x * 3, bad, worse, x * 0, x * 1e-38, x * 1e36, -x.abs()])
    shared, many = randn(40, 1, 1) * randn(40, 129, 384), randn(300, 1, 1) * randn(300, 128, 256)
    inputs = [x, shared, few, many, randn(600, 3, 16), randn(37, 203)]
    inputs += [few.mT, few[::2], few[:, :0]]
    return [(x, element, pow2) for x in inputs for element, pow2 in ((e4m3, False), (e5m2, True))]
