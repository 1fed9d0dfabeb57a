"""Runs of the tokens of ragged groups in registers: what kernels share that work along tokens.

The rows of a tile are a tuple, as in ``turned``: rows[k][BN, BC] holds token k of BN runs, in BC
channels that lie side by side in x. A run is what one scale is for, or one Hadamard transform, so
that no maximum and no sum crosses threads; only what has been narrowed is exchanged.
"""

import triton
import triton.language as tl

from lpcompile.ops import fp8, hadamard


@triton.jit
def load(
    x_ptr, first, last, c, C, stride_t, stride_c, SIZE: tl.constexpr, SIGNS: tl.constexpr
):  # fmt: skip
    """Runs of SIZE tokens that begin at rows first[BN], channels c[BC] -> their rows, fp32.

    Rows from ``last`` on are zeros. SIGNS: of the Hadamard transform that the runs get, or None.
    """
    step = tl.cast(stride_t, tl.int64)
    at = x_ptr + (first[:, None] * step + c[None, :].to(tl.int64) * stride_c)
    rows = ()
    for k in tl.static_range(SIZE):
        x = tl.load(at + k * step, mask=(first + k < last)[:, None] & (c < C)[None, :], other=0.0)
        x = x.to(tl.float32) if SIGNS is None else hadamard.signed(x, k, SIGNS)
        rows = rows + (x,)  # type: ignore[assignment]
    return rows if SIGNS is None else hadamard.transform(rows)


@triton.jit
def amax(rows):
    """The largest magnitude of each run [BN, BC], as its elements are in bf16; NaN above all.

    Rounding keeps order, so it comes after the maximum.
    """
    best = tl.abs(rows[0])
    for k in tl.static_range(1, len(rows)):
        best = fp8.larger(best, tl.abs(rows[k]))
    return best.to(tl.bfloat16).to(tl.float32)


@triton.jit
def scaled(rows, scale, first, last, SIGNS: tl.constexpr):
    """Each run's elements, in bf16, times its scale[BN, BC] -> rows, fp32.

    Where there is no token the product is zero, under a NaN scale too; the transform spreads the
    tokens of a run over all of it.
    """
    out = ()
    for k in tl.static_range(len(rows)):
        live = first + (k if SIGNS is None else 0) < last
        v = rows[k].to(tl.bfloat16).to(tl.float32) * scale
        out = out + (tl.where(live[:, None], v, 0.0),)  # type: ignore[assignment]
    return out
