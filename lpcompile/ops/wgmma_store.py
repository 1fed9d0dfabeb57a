"""What a warpgroup of ``wgmma`` makes of a sum: scaled, rounded, an addend added, and stored.

It goes through shared memory in chunks of 64x64, from where TMA stores it while the next tile is
multiplied. Where an addend is added to it, where TMA cannot store, or where rows past a group's
last would be stored too, it comes back to registers so that a warp holds whole lines.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# How a part [64, 64] of a sum lies.
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))


@gluon.jit
def scales_of(scaling, tile, MW: gl.constexpr, NW: gl.constexpr, layout: gl.constexpr):
    """The scales of MW rows and of NW columns of a tile.

    They are read before the sum is made, and those of columns lie where few registers hold them.
    Rows past the last have its scale; nothing of them is stored.
    """
    a_scales, b_scales, strides = scaling
    m, rows, n, N = tile
    r = gl.minimum(m + gl.arange(0, MW, gl.SliceLayout(1, layout)), rows - 1)
    thin: gl.constexpr = gl.BlockedLayout([NW // 128], [32], [4], [0])
    c = gl.minimum(n + gl.arange(0, NW, thin), N - 1)
    return gl.load(a_scales + r * strides[1]), gl.load(b_scales + c * strides[4])


@gluon.jit
def scaled(acc, scales, layout: gl.constexpr):
    """Acc[MW, NW] times the scales of its rows and of its columns."""
    by_column = gl.convert_layout(scales[1], gl.SliceLayout(0, layout))
    return acc * gl.expand_dims(scales[0], 1) * gl.expand_dims(by_column, 0)


@gluon.jit
def halves(x, DIM: gl.constexpr):
    """x[M, N] cut in two along a dimension, in the same registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    if DIM == 0:
        return x.reshape((2, M // 2, N)).permute((1, 2, 0)).split()
    else:  # noqa: RET505
        return x.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()


@gluon.jit
def joined(x, y):
    """x[M, N], y[M, N] -> [M, 2 N], in the same registers."""
    return gl.join(x, y).permute((0, 2, 1)).reshape((x.shape[0], 2 * x.shape[1]))


@gluon.jit
def cut(x):
    """x[64, 256] or x[128, 128] -> its four [64, 64], row after row."""
    if x.shape[0] == 128:
        first, second = halves(x, 0)
    else:
        first, second = halves(x, 1)
    a, b = halves(first, 1)
    c, d = halves(second, 1)
    return a, b, c, d


@gluon.jit
def store(parts, arrays, base, tile, MW: gl.constexpr, WG: gl.constexpr):
    """Round the four [64, 64] of a sum of MW rows, and store it from row base on of out[.., N].

    Where there is an addend, it is added to what was rounded, and the sum rounded once more.
    """
    _, addend_ptr, out_desc, bufs = arrays
    m, rows, n, N = tile
    ACROSS: gl.constexpr = 256 // MW
    NUM: gl.constexpr = bufs.shape[0] // 2  # buffers of a warpgroup
    for first in gl.static_range(0, 4, NUM):
        tma.store_wait(0)  # until what was stored from the buffers has been read
        for i in gl.static_range(NUM):
            part = gl.convert_layout(parts[first + i], PART, assert_trivial=True)
            bufs.index(WG * NUM + i).store(part.to(bufs.dtype))
        if out_desc is not None and addend_ptr is None:
            fence_async_shared()
        for i in gl.static_range(NUM):
            row = m + (first + i) // ACROSS * 64
            column = n + (first + i) % ACROSS * 64
            put(bufs.index(WG * NUM + i), arrays, base, row, rows, column, N)


@gluon.jit
def put(buf, arrays, base, m, rows, n, N):
    """Store a chunk [64, 64] from ``buf``."""
    out_ptr, addend_ptr, out_desc, _ = arrays
    if out_desc is not None and addend_ptr is None:
        if m + 64 <= rows:
            tma.async_copy_shared_to_global(out_desc, [base + m, n], buf)
        elif m < rows:
            put_rows(buf, out_ptr, addend_ptr, base, m, rows, n, N)
    else:
        put_rows(buf, out_ptr, addend_ptr, base, m, rows, n, N)


@gluon.jit
def put_rows(buf, out_ptr, addend_ptr, base, m, rows, n, N):
    """Store those rows and columns of a chunk that there are, and of them each with its addend."""
    VECTOR: gl.constexpr = 128 // buf.dtype.primitive_bitwidth
    ACROSS: gl.constexpr = min(64 // VECTOR, 32)
    lines: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    out = buf.load(lines)
    r = m + gl.arange(0, 64, gl.SliceLayout(1, lines))
    c = n + gl.arange(0, 64, gl.SliceLayout(0, lines))
    at = gl.expand_dims((base + r).to(gl.int64) * N, 1) + gl.expand_dims(c, 0)
    live = gl.expand_dims(r < rows, 1) & gl.expand_dims(c < N, 0)
    if addend_ptr is not None:
        addend = gl.load(addend_ptr + at, mask=live)
        out = (out.to(gl.float32) + addend.to(gl.float32)).to(out.dtype)
    gl.store(out_ptr + at, out, mask=live)
