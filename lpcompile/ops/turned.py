"""A tile of x.T, read as x lies in memory and turned in registers: the transposing kernels' reads.

RUN rows of x that follow each other are RUN tiles [BN, BC], each loaded with its columns side by
side. Joined, a thread holds RUN elements of a row of x.T: the maximum of a block crosses few
threads or none, and what has been narrowed is exchanged between threads in vectors, to be stored
with the elements of a row of x.T side by side.

Against one load of [RUN * BN, BC] and ``tl.trans``: that exchanges byte by byte, and its maxima
cross warps: 35 instructions an element of MXFP8 against 8, 68 of NVFP4 against 20 (sm_90).
"""

import triton
import triton.language as tl

# Two fp32 numbers in a register of bf16, with the one NaN that torch writes: no number is above
# 0x7FC0 as a signed integer, and the conversion makes NaN 0x7FFF.
TO_BF16 = tl.constexpr("""{
    .reg .b32 both, nan;
    cvt.rn.bf16x2.f32 both, $2, $1;
    mov.b32 nan, 0x7FC07FC0;
    min.s16x2 $0, both, nan;
    }""")


@triton.jit
def joined(v, HALF: tl.constexpr):
    """Tensors k and k + HALF of a tuple of 2 HALF joined, along a new last dimension."""
    out = ()
    for k in tl.static_range(HALF):
        out = out + (tl.join(v[k], v[k + HALF]),)  # type: ignore[assignment]
    return out


@triton.jit
def turned(rows):
    """A tuple of 2, 4 .. 32 tiles [BN, BC] -> [BC, BN * RUN], the tuple's index fastest."""
    RUN: tl.constexpr = len(rows)
    BN: tl.constexpr = rows[0].shape[0]
    BC: tl.constexpr = rows[0].shape[1]
    y = rows
    if RUN >= 32:
        y = joined(y, 16)
    if RUN >= 16:
        y = joined(y, 8)
    if RUN >= 8:
        y = joined(y, 4)
    if RUN >= 4:
        y = joined(y, 2)
    y = joined(y, 1)[0]
    return tl.reshape(tl.permute(tl.reshape(y, (BN, BC, RUN)), (1, 0, 2)), (BC, BN * RUN))


@triton.jit
def read(ptr, live, EVEN: tl.constexpr):
    """``tl.load``, zeros where not ``live``; EVEN: everything is."""
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=live, other=0.0)


@triton.jit
def widened(x):
    """A tile bf16 -> fp32: of two elements of a register, each by one instruction."""
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def bits(x, PAIRS: tl.constexpr):
    """A tile fp32 -> its bits in bf16, int16, with the one NaN that torch writes.

    PAIRS: the device compares 16-bit integers two at a time.
    """
    if PAIRS:
        return tl.inline_asm_elementwise(
            TO_BF16, "=r,r,r", [x], dtype=tl.int16, is_pure=True, pack=2
        )
    return tl.where(x == x, x.to(tl.bfloat16).to(tl.int16, bitcast=True), 0x7FC0)


@triton.jit
def larger(a, b):
    """The one of two tiles bf16 of the larger magnitude, but for its sign; NaN above all."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;",
        "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def amax(rows):
    """The largest magnitude of each run of a tuple of 4, 8, 16 or 32 tiles bf16, fp32."""
    y = rows
    if len(y) == 32:
        y = halved(y, 16)
    if len(y) == 16:
        y = halved(y, 8)
    if len(y) == 8:
        y = halved(y, 4)
    return tl.abs(widened(halved(halved(y, 2), 1)[0]))


@triton.jit
def halved(v, HALF: tl.constexpr):
    """The larger of tensors k and k + HALF of a tuple of 2 HALF."""
    out = ()
    for k in tl.static_range(HALF):
        out = out + (larger(v[k], v[k + HALF]),)  # type: ignore[assignment]
    return out


@triton.jit
def write(ptr, value, live, EVEN: tl.constexpr):
    """``tl.store`` where ``live``; EVEN: everywhere."""
    if EVEN:
        tl.store(ptr, value)
    else:
        tl.store(ptr, value, mask=live)


@triton.jit
def rows(
    x_ptr, r, c, R, C, stride_r, stride_c, RUN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns c[BN] + k of rows r[BR] of x[R, C], for each k < RUN: tiles [BN, BR]."""
    at = x_ptr + r[None, :].to(tl.int64) * stride_r + c[:, None].to(tl.int64) * stride_c
    out = ()
    for k in tl.static_range(RUN):
        live = (c + k < C)[:, None] & (r < R)[None, :]
        out = out + (read(at, live, EVEN),)  # type: ignore[assignment]
        at += stride_c
    return out


@triton.jit
def load(
    x_ptr, r, first, R, C, stride_r, stride_c,
    BC: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows r[BR] and columns ``first`` on of x[R, C] -> [BR, BC], zeros outside of x.

    RUN: 1, or where rows are adjacent in memory, the elements of a row that a thread is to hold.
    EVEN: no tile reaches over the edge of x.
    """
    if RUN == 1:
        c = first + tl.arange(0, BC)
        at = r[:, None].to(tl.int64) * stride_r + c[None, :].to(tl.int64) * stride_c
        tile = read(x_ptr + at, (r < R)[:, None] & (c < C)[None, :], EVEN)
    else:
        c = first + tl.arange(0, BC // RUN) * RUN
        tile = turned(rows(x_ptr, r, c, R, C, stride_r, stride_c, RUN, EVEN))
    return tile
