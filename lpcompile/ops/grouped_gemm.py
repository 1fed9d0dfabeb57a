"""The grouped GEMM of quantized operands, persistent, in Triton: any scales, sides and elements.

Two shapes (see ``scaled_grouped_mm``): the rows of group e of a[T, K] with b[e] of b[E, N, K], and
the columns of group e of a[M, Tp] with those of b[N, Tp]. Tiles are cut inside groups, and every
program finds the group of a tile on the device, so that nothing depends on the host.

``wgmma`` does the same on Hopper, two to four times as fast; ``kernel`` here is for other GPUs and
for strides that TMA cannot read. CUTLASS, through aten, has row scales only, and with precise
accumulation falls to 215 to 300 TFLOP/s at 64 groups and more (``wgmma``: 850 to 1070).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion as Version

from lpcompile.errors import ShapeError
from lpcompile.ops import device, groups
from lpcompile.ops.define import ALIGN, cdiv, next_power_of_2
from lpcompile.ops.launcher import cached
from lpcompile.ops.quantize_fp8_block import BLOCK

STEP = 64  # elements of bf16 in a step of ``wgmma``
RUN_IN = Version("3.6") <= Version(triton.__version__) < Version("3.8")  # those ``wgmma`` was


@triton.jit
def contract(
    a_ptr,  # [BM, 1]: each row's first element
    b_ptr,  # [1, BN]
    a_scale_ptr,  # [BM]: each row's first scale
    b_scale_ptr,  # [BN], or one for all
    a_scale_stride,  # from one block of the contraction to the next
    b_scale_stride,
    begin,  # multiples of 16
    end,
    BLOCKED: tl.constexpr,
    FAST: tl.constexpr,
    WHOLE: tl.constexpr,  # begin and end are multiples of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The fp32 accumulator of one tile over columns ``begin`` to ``end``."""
    acc = tl.zeros([BM, BN], tl.float32)
    # Divided and multiplied again by 16, to show the compiler that whole vectors are in or out.
    end = end // 16 * 16
    for i in range(0, tl.cdiv(end - begin, BK)):
        k = (begin // 16 + i * (BK // 16)) * 16 + tl.arange(0, BK)
        if WHOLE:
            a = tl.load(a_ptr + k[None, :])
            b = tl.load(b_ptr + k[:, None])
        else:
            a = tl.load(a_ptr + k[None, :], mask=(k < end)[None, :], other=0.0)
            b = tl.load(b_ptr + k[:, None], mask=(k < end)[:, None], other=0.0)
        if BLOCKED:
            at = begin // BK + i
            a_scale = tl.load(a_scale_ptr + at * a_scale_stride)[:, None]
            b_scale = tl.load(b_scale_ptr + at * b_scale_stride)[None, :]
            acc += tl.dot(a, b) * (a_scale * b_scale)
        elif FAST:
            acc = tl.dot(a, b, acc)
        else:
            # Hopper's FP8 tensor cores keep about 14 bits between promotions to fp32: one every BK.
            acc += tl.dot(a, b)
    return acc


@triton.jit
def place(tile, starts, ends, M, N, K, ALONG_K: tl.constexpr, BM: tl.constexpr, EP: tl.constexpr):
    """A tile: its group, the rows of a and the columns of the contraction, its index in there."""
    BN: tl.constexpr = BM
    across = tl.cdiv(N, BN)
    if ALONG_K:
        per_group = tl.cdiv(M, BM) * across
        group = tile // per_group
        e = tl.arange(0, EP)
        begin = tl.sum(tl.where(e == group, starts, 0), 0)
        end = tl.sum(tl.where(e == group, ends, 0), 0)
        first, last, index = 0, M, tile % per_group
    else:
        group, first, last, strip, _ = groups.locate(tile // across, starts, ends, BM, 1, EP)
        begin, end, index = 0, K, strip * across + tile % across
    # Down first, eight tiles high, so that tiles that run together share operands in L2.
    down = tl.cdiv(last - first, BM)
    strip = index // (8 * across)
    index = index % (8 * across)
    height = tl.minimum(down - strip * 8, 8)
    m = first + (strip * 8 + index % height) * BM + tl.arange(0, BM)
    n = index // height * BN + tl.arange(0, BN)
    return group.to(tl.int64), m, last, n, begin, end


@cached
@triton.jit
def kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    offs_ptr,
    out_ptr,
    E,
    M,  # rows of a, in wgrad
    N,
    K,
    a_stride,
    b_stride_e,
    b_stride,
    a_scale_stride_e,
    a_scale_stride,
    a_scale_stride_k,
    b_scale_stride_e,
    b_scale_stride,
    b_scale_stride_k,
    ALONG_K: tl.constexpr,  # groups lie along the contraction: wgrad
    SQUARE: tl.constexpr,  # of b's scales: a tile's rows share one
    BLOCKED: tl.constexpr,
    FAST: tl.constexpr,
    WHOLE: tl.constexpr,
    B: tl.constexpr,  # every side of a tile
    EP: tl.constexpr,
):
    starts, ends = groups.load(offs_ptr, E, EP)
    if ALONG_K:
        strips = E * tl.cdiv(M, B)
    else:
        strips = tl.sum(tl.where(ends > starts, tl.cdiv(ends - starts, B), 0), 0)
    for tile in range(tl.program_id(0), strips * tl.cdiv(N, B), tl.num_programs(0)):
        group, m, last, n, begin, end = place(tile, starts, ends, M, N, K, ALONG_K, B, EP)
        # Rows past the end read the last one; nothing of them is stored.
        row, column = tl.minimum(m, last - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
        a_scales = a_scale_ptr + group * a_scale_stride_e + row * a_scale_stride
        b_scales = b_scale_ptr + group * b_scale_stride_e
        b_scales += (column // B if SQUARE else column) * b_scale_stride
        a_rows = a_ptr + (row * a_stride)[:, None]
        b_rows = b_ptr + (group * b_stride_e + column * b_stride)[None, :]
        acc = contract(
            a_rows, b_rows, a_scales, b_scales, a_scale_stride_k, b_scale_stride_k,
            begin, end, BLOCKED, FAST, WHOLE, B, B, B,
        )  # fmt: skip
        if not BLOCKED:
            acc = acc * tl.load(a_scales)[:, None] * tl.load(b_scales)[None, :]
        to = m.to(tl.int64)
        if ALONG_K:
            to += group * M
        live = (m < last)[:, None] & (n < N)[None, :]
        out = out_ptr + to[:, None] * N + n[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live)


def fill(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    out: Tensor,
    fast_accum: bool,
    addend: Tensor | None = None,
) -> None:
    """Multiply as ``scaled_grouped_mm`` says, into ``out``."""
    if a_scale.dim() == 2 and a_scale.shape[0] != a.shape[0]:
        raise ShapeError(
            f"a grouped GEMM takes blocks of 1x{BLOCK} for its first operand: got scales "
            f"{list(a_scale.shape)} for values {list(a.shape)}; blocks of {BLOCK}x{BLOCK} are for "
            "weights"
        )
    if suits_warpgroups(a, a_scale, b, b_scale):
        from lpcompile.ops import wgmma  # which not every Triton can import

        wgmma.fill(a, a_scale, b, b_scale, offs, out, fast_accum, addend)
    else:
        fill_anywhere(a, a_scale, b, b_scale, offs, out, fast_accum)
        if addend is not None:
            out += addend


def suits_warpgroups(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> bool:
    """Whether ``wgmma`` multiplies these: on Hopper, what TMA can read, in a Triton it was run in.

    Gluon, which it is written in, is experimental: names in it change.
    """
    if not RUN_IN or device.capability(a)[0] != 9 or not a.shape[1]:
        return False
    readable = _is_readable(a) and _is_readable(b)
    # Of a stack the other way round, a step past the end would read the next matrix.
    stacked = b.dim() == 2 or b.is_contiguous() or (b.mT.is_contiguous() and b.shape[2] % STEP == 0)
    if a_scale.dim() == 2 and b_scale.shape[-2] == b.shape[-2]:
        # Blocks of 1x128 in b: the scales of a step are a line that TMA reads too, and where it
        # begins to read must be a multiple of 16 bytes (else it is an illegal instruction).
        # N of 4 n would do; N of 16 n is what has run.
        lines = b_scale.mT.is_contiguous() and b_scale.data_ptr() % ALIGN == 0
        return readable and stacked and lines and b.shape[-2] % ALIGN == 0
    return readable and stacked


def _is_readable(x: Tensor) -> bool:
    """Whether TMA reads x[..., R, C]: rows of whole vectors; in bf16 they may be those of x.T."""
    x = x.mT if x.stride(-1) != 1 and x.dtype is torch.bfloat16 else x
    whole = x.stride(-2) * x.element_size() % ALIGN == 0
    return x.stride(-1) == 1 and whole and x.data_ptr() % ALIGN == 0


def fill_anywhere(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    out: Tensor,
    fast_accum: bool,
) -> None:
    """The same by ``kernel``, which any GPU with FP8 runs, whatever the strides."""
    (M, K), N, E = a.shape, b.shape[-2], offs.shape[0]
    blocked, along_k = a_scale.dim() == 2, b.dim() == 2
    square = blocked and b_scale.shape[-2] != N
    tiles = cdiv(N, BLOCK) * (cdiv(M, BLOCK) + E)
    if along_k:
        tiles = E * cdiv(M, BLOCK) * cdiv(N, BLOCK)
    processors = device.processors(a)
    kernel[(min(tiles, processors),)](
        a, a_scale, b, b_scale, offs, out, E, M, N, K,
        a.stride(0), 0 if along_k else b.stride(0), b.stride(-2),
        *strides(a_scale, a, along_k), *strides(b_scale, b, along_k),
        along_k, square, blocked, fast_accum, blocked if along_k else K % BLOCK == 0,
        BLOCK, next_power_of_2(E), num_warps=8, num_stages=4 if a.itemsize == 1 else 3,
    )  # fmt: skip


def strides(scales: Tensor, values: Tensor, along_k: bool) -> tuple[int, int, int]:
    """From one group's scales to the next's, from one row's, and from one block's along K."""
    per_group = values.dim() == 3
    if scales.dim() == 2 + per_group:
        return scales.stride(0) if per_group else 0, scales.stride(-2), scales.stride(-1)
    if per_group:
        return scales.stride(0), scales.stride(1) if scales.dim() == 2 else 0, 0
    if scales.numel() == 1:
        return 0, 0, 0
    return values.shape[0] if along_k else 0, 1, 0
