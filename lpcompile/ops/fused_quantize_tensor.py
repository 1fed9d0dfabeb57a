"""Amax and quantize in one read: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scale[1], amax[1].

Of x[E, R, C], the weights of experts: values[E, R, Cp], scale[E], amax[E]. The bits are those of
``amax_tensor`` and ``quantize_fp8_tensor``. Made by ``passes/fuse_columns.py``.

Programs that share a matrix hold it in their registers: each reads its part, posts its maximum, and
waits for the others', while those of other matrices read or write. All programs of a launch must
run at once, or they would wait for what never starts: the launch is cooperative, which the driver
refuses where they cannot. A matrix that does not leave room for a second is read twice, as before.

64 matrices of 1408 x 2048 take 193 us where the two ops take 222, 128 of 768 x 2048 180 where they
take 241; a copy's bandwidth allows 134 and 146 (H200, torch 2.11). Slower, of the former: an atomic
maximum and a counter to wait for (198), smaller parts (224 to 274), loads ahead into shared memory
(197 to 268), matrices begun one after another (207), and programs in order, without a cooperative
launch, which find a matrix in L2 when they cast it (198 to 341; 8 of 2048 x 7168: 144 to 335, the
two ops 146).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_tensor, device, fp8, quantize_fp8_tensor
from lpcompile.ops.define import ALIGN, cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.fused_source import NAMES
from lpcompile.ops.launcher import cached

# Elements that a program holds, its warps, and how many of it a multiprocessor runs at once.
PART, WARPS, RESIDENT = 16384, 4, 4
REGISTERS = 65536  # of a multiprocessor
LARGEST = 2**22  # elements of a matrix, of which 132 multiprocessors hold two


def fits(R: int, C: int) -> bool:
    """Whether a matrix is what the kernel is for."""
    return C % ALIGN == 0 and 0 < R * C <= LARGEST


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_tensor.outputs(x)
    return (*quantize_fp8_tensor.outputs(x, amax, element, pow2), amax)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_tensor.reference(x)
    return (*quantize_fp8_tensor.reference(x, amax, element, pow2), amax)


@triton.jit
def posted(ptr):
    """What is at addresses ptr[N] as soon as none of it is 0.

    One word says that a maximum is there and which, so that nothing else has to be in order.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred none; WAIT: ld.relaxed.gpu.global.u32 $0, [$1]; setp.eq.u32 none, $0, 0;"
        " @none bra WAIT; }",
        "=r,l",
        [ptr],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cached
@triton.jit
def kernel(
    x_ptr,  # words of two elements
    values_ptr,
    scales_ptr,
    amax_ptr,
    posted_ptr,  # [E, SHARE] zeros
    E,
    n,  # words of a matrix
    SHARE,  # programs that share a matrix
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    part, first = tl.program_id(0) % SHARE, tl.program_id(0) // SHARE
    at = part * PART + tl.arange(0, PART)
    slots = tl.minimum(tl.arange(0, SLOTS), SHARE - 1)
    for e in range(first, E, tl.num_programs(0) // SHARE):
        to = tl.cast(e, tl.int64) * n + at
        x = tl.load(x_ptr + to) if EVEN else tl.load(x_ptr + to, mask=at < n, other=0)
        # Magnitudes of bf16 are in the order of their bits, NaN above Inf above all. Kept as words
        # they take half the registers that fp32 would.
        best = tl.max(tl.maximum(x & 0x7FFF, (x >> 16) & 0x7FFF), 0)
        tl.atomic_xchg(posted_ptr + e * SHARE + part, best + 1, sem="relaxed")
        best = tl.max(posted(posted_ptr + e * SHARE + slots), 0) - 1
        bits = tl.where(best > 0x7F80, 0x7FC0, best) << 16
        scale = fp8.encode(bits.to(tl.float32, bitcast=True), LIMIT, POW2)
        low = (x << 16).to(tl.float32, bitcast=True) * scale
        high = (x & -65536).to(tl.float32, bitcast=True) * scale
        narrow = fp8.narrow2(low, high, ELEMENT)
        if EVEN:
            tl.store(values_ptr + to, narrow)
        else:
            tl.store(values_ptr + to, narrow, mask=at < n)
        if part == 0:
            tl.store(scales_ptr + e, fp8.decode(scale))
            tl.store(amax_ptr + e, bits)


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    experts = fp8.stack(x)
    E, R, C = experts.shape
    most = RESIDENT * device.processors(x)
    share = cdiv(R * C, PART)
    words = experts.is_contiguous() and x.data_ptr() % ALIGN == 0
    if not (fits(R, C) and words and share <= most):
        amax = amax_tensor.launch(x)
        return (*quantize_fp8_tensor.launch(x, amax, element, pow2), amax)
    values, scales, amax = outputs(x, element, pow2)
    posts = torch.zeros((E, share), dtype=torch.int32, device=x.device)
    kernel[(share * min(E, most // share),)](
        experts.view(torch.int32), values.view(torch.int16), scales, amax.view(torch.int32), posts,
        E, R * C // 2, share, fp8.MAX[element], pow2, NAMES[element], PART // 2,
        next_power_of_2(share), R * C % PART == 0, num_warps=WARPS,
        maxnreg=REGISTERS // (RESIDENT * WARPS * 32), launch_cooperative_grid=True,
    )  # fmt: skip
    return values, scales, amax


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
    inputs = [x, x[:1], shared, few, many, randn(600, 3, 16), randn(37, 203)]
    inputs += [few.mT, few[::2], few[:, :0]]
    return [(x, element, pow2) for x in inputs for element, pow2 in ((e4m3, False), (e5m2, True))]
