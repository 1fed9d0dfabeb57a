"""Runs of the tokens of ragged groups in registers: what kernels share that work along tokens.

The rows of a tile are a tuple, as in ``turned``: rows[k][BN, BC] holds token k of BN runs, in BC
channels that lie side by side in x. A run is what one scale is for, or one Hadamard transform, so
that no maximum and no sum crosses threads; only what has been narrowed is exchanged.
"""

import triton
import triton.language as tl

from lpcompile.ops import fp8


@triton.jit
def load(x_ptr, first, last, c, C, stride_t, stride_c, SIZE: tl.constexpr, whole):
    """Runs of SIZE tokens that begin at rows first[BN], channels c[BC] -> their rows, fp32.

    Rows from ``last`` on are zeros. whole: there are none, and no channel from C on; masks would
    be a third of what the kernel of a tile issues.
    """
    step = tl.cast(stride_t, tl.int64)
    at = x_ptr + (first[:, None] * step + c[None, :].to(tl.int64) * stride_c)
    if whole:
        rows = ()
        for k in tl.static_range(SIZE):
            rows = rows + (tl.load(at + k * step).to(tl.float32),)  # type: ignore[assignment]
    else:
        rows = ()
        for k in tl.static_range(SIZE):
            live = (first + k < last)[:, None] & (c < C)[None, :]
            x = tl.load(at + k * step, mask=live, other=0.0)
            rows = rows + (x.to(tl.float32),)  # type: ignore[assignment]
    return rows


@triton.jit
def amax(rows):
    """The largest magnitude of each run [BN, BC], as its elements are in bf16; NaN above all.

    Rounding keeps order, so it comes after the maximum.
    """
    best = tl.abs(rows[0])
    for k in tl.static_range(1, len(rows)):
        best = fp8.larger(best, tl.abs(rows[k]))
    return best.to(tl.bfloat16).to(tl.float32)
