"""What a warpgroup of ``wgmma`` makes of a sum: scaled, rounded, an addend added, and stored.

As a sum lies, a thread holds two columns of a row and then two of another; through shared memory it
comes to lie so that a thread holds 16 bytes and a warp whole lines. An addend is read as that lies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def scales_of(
    scales,
    strides,
    m,
    rows,
    n,
    N,
    MW: gl.constexpr,
    NW: gl.constexpr,
    BLOCKED: gl.constexpr,
    layout: gl.constexpr,
):
    """The scales of MW rows from m and of NW columns from n, unless blocks have them.

    They are read before the sum is made, and those of columns lie where few registers hold them.
    Rows past the last have its scale; nothing of them is stored.
    """
    if BLOCKED:
        return 0.0, 0.0
    else:  # noqa: RET505
        r = gl.minimum(m + gl.arange(0, MW, gl.SliceLayout(1, layout)), rows - 1)
        thin: gl.constexpr = gl.BlockedLayout([NW // 128], [32], [4], [0])
        c = gl.minimum(n + gl.arange(0, NW, thin), N - 1)
        return gl.load(scales[0] + r * strides[0]), gl.load(scales[1] + c * strides[1])


@gluon.jit
def store(acc, scales, arrays, base, m, rows, n, N, BLOCKED: gl.constexpr, layout: gl.constexpr):
    """Scale acc, round it, and store it from row base + m and column n of out[.., N].

    Where there is an addend, it is added to what was rounded, and the sum rounded once more.
    """
    out_ptr, addend_ptr = arrays
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    if not BLOCKED:
        acc = acc * gl.expand_dims(scales[0], 1)
        by_column = gl.convert_layout(scales[1], gl.SliceLayout(0, layout))
        acc = acc * gl.expand_dims(by_column, 0)
    VECTOR: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = min(BN // VECTOR, 32)
    lines: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), lines)
    r = m + gl.arange(0, BM, gl.SliceLayout(1, lines))
    c = n + gl.arange(0, BN, gl.SliceLayout(0, lines))
    at = gl.expand_dims((base + r).to(gl.int64) * N, 1) + gl.expand_dims(c, 0)
    live = gl.expand_dims(r < rows, 1) & gl.expand_dims(c < N, 0)
    if addend_ptr is not None:
        addend = gl.load(addend_ptr + at, mask=live)
        out = (out.to(gl.float32) + addend.to(gl.float32)).to(out.dtype)
    gl.store(out_ptr + at, out, mask=live)
