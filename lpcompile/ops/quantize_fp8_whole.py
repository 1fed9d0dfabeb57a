"""Quantize to FP8 under the amax of each matrix: x[E, R, C] -> values[E, R, Cp], scale[E], amax[E].

Of x[R, C]: values[R, Cp], scale[1], amax[1]. Both ops in one, ``amax_tensor`` and
``quantize_fp8_tensor``, to their bits. Where matrices are small, the weights of experts, one kernel
takes the maximum of one while it narrows another that it has just read, and that L2 still holds:
64 of 1408 x 2048 in 185 us where the two take 223, 128 of 768 x 2048 in 198 where they take 241,
which at copy speed would be 132 and 144 (H200, triton 3.6).

Programs take numbers, one after another. Under even ones they take maxima, matrix after matrix;
under odd ones they narrow the matrix ``LAG`` before, once all of its maximum is taken. Those
numbers were handed out earlier, to programs that run and wait for nobody then, so that whoever
waits does so for what is under way, whatever else runs on the GPU: a cooperative launch, where all
programs of a matrix hold it in registers and wait for each other, waits for every multiprocessor
first. Smaller tiles are slower for the numbers (8192 elements: 214 us), more programs on a
multiprocessor for what they have under way, which L2 has to hold (8 of 8192: 224 us; without what
says what L2 is to keep 252).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_tensor, device, fp8, quantize_fp8_tensor
from lpcompile.ops.define import ALIGN, cdiv, define, same_bits
from lpcompile.ops.launcher import cached

SIZE, WARPS = 16384, 8  # elements at a time
RESIDENT = 4  # programs of a multiprocessor
LAG = 3  # matrices from that whose maximum is taken to that which is narrowed
LARGEST = 2**23  # elements of a matrix; of 8 of 15 million 157 us, the two ops 146

Made = tuple[Tensor, Tensor, Tensor]


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> Made:
    amax = amax_tensor.outputs(x)
    return (*quantize_fp8_tensor.outputs(x, amax, element, pow2), amax)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> Made:
    amax = amax_tensor.reference(x)
    return (*quantize_fp8_tensor.reference(x, amax, element, pow2), amax)


@cached
@triton.jit
def kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    amax_ptr,
    state_ptr,
    E,
    n: tl.int32,
    LAG: tl.constexpr,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
):
    tiles = tl.cdiv(n, SIZE)  # of a matrix
    done_ptr = state_ptr + 1
    number = tl.atomic_add(state_ptr, 1, sem="relaxed")
    while number < 2 * tiles * (E + LAG):
        e, at = number // (2 * tiles), number % (2 * tiles)
        i = (at // 2) * SIZE + tl.arange(0, SIZE)
        if at % 2 == 0:
            if e < E:
                x_tile = x_ptr + e.to(tl.int64) * n + i
                if EVEN:
                    x = tl.load(x_tile, eviction_policy="evict_last")
                else:
                    x = tl.load(x_tile, mask=i < n, other=0.0, eviction_policy="evict_last")
                bits = fp8.bits_of_amax(fp8.amax(x, 0))
                tl.atomic_max(amax_ptr + e, bits, sem="relaxed")
                tl.atomic_add(done_ptr + e, 1, sem="release")
        elif e >= LAG:
            e -= LAG
            done = tl.atomic_add(done_ptr + e, 0, sem="acquire")
            while done < tiles:
                done = tl.atomic_add(done_ptr + e, 0, sem="acquire")
            amax = tl.atomic_max(amax_ptr + e, 0, sem="relaxed").to(tl.float32, bitcast=True)
            scale = fp8.encode(amax, LIMIT, POW2)
            x_tile = x_ptr + e.to(tl.int64) * n + i
            made_tile = values_ptr + e.to(tl.int64) * n + i
            if EVEN:
                x = tl.load(x_tile, eviction_policy="evict_first")
                made = fp8.narrow(x.to(tl.float32) * scale, ELEMENT)
                tl.store(made_tile, made, eviction_policy="evict_first")
            else:
                x = tl.load(x_tile, mask=i < n, other=0.0, eviction_policy="evict_first")
                made = fp8.narrow(x.to(tl.float32) * scale, ELEMENT)
                tl.store(made_tile, made, mask=i < n, eviction_policy="evict_first")
            if at == 1:
                tl.store(scales_ptr + e, fp8.decode(scale, POW2))
        number = tl.atomic_add(state_ptr, 1, sem="relaxed")


def pays(num_matrices: int, size: int) -> bool:
    """Whether matrices of so many elements are enough, and L2 holds those that are under way."""
    return num_matrices > LAG and size <= LARGEST


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> Made:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    E, n = amax_tensor.outputs(x).numel(), x.shape[-2] * x.shape[-1]
    if not pays(E, n) or x.shape[-1] % ALIGN or not x.is_contiguous():
        amax = amax_tensor.launch(x)
        return (*quantize_fp8_tensor.launch(x, amax, element, pow2), amax)
    values, scales, amax = outputs(x, element, pow2)
    state = amax.new_empty(E + 1, dtype=torch.int32)
    torch._foreach_zero_([amax, state])
    programs = min(2 * cdiv(n, SIZE) * (E + LAG), device.processors(x) * RESIDENT)
    kernel[(programs,)](
        x, values, scales, amax.view(torch.int32), state, E, n, LAG,
        fp8.MAX[element], pow2, fp8.TRITON[element], SIZE, n % SIZE == 0, num_warps=WARPS,
    )  # fmt: skip
    return values, scales, amax


op = define(
    "quantize_fp8_whole(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    many = torch.randn(9, 48, 704, device=device, dtype=torch.bfloat16)
    many[3] *= 0
    many[5, 4, 3], many[7, 40, 7] = torch.nan, torch.inf
    single = torch.randn(1, 96, device=device, dtype=torch.bfloat16)
    inputs = [*(x for (x,) in amax_tensor.samples(device)), single]
    return [
        (x, element, pow2)
        for x in (*inputs, many)
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
