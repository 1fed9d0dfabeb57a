"""Multiply on Hopper's warpgroups, a matrix or group by group, in Gluon:

    a[M, K],  b[N, K]             -> [M, N]
    a[T, K],  b[E, N, K], offs[E] -> [T, N]      the rows of group e with b[e]
    a[M, Tp], b[N, Tp],   offs[E] -> [E, M, N]   the columns of group e of both

Operands are FP8, or bf16, which may lie in memory the other way round, with scales as
``grouped_gemm`` takes them. In the last form groups begin at multiples of ``groups.ALIGN``, so that
a step of the contraction is of one group.

The kernel is persistent, and its warps are specialized: one brings tiles to shared memory by TMA,
as long as buffers are empty; two warpgroups multiply them (``wgmma_contract``), each its own part
of a tile, so that one multiplies while the other adds, scales or stores (``wgmma_store``). Every
warp finds the tiles of its program alone.

What was measured against CUTLASS and cuBLASLt is in docs/benchmarks.md, what was tried in
docs/tuning.md.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lpcompile.ops import device, grouped_gemm
from lpcompile.ops.define import ALIGN, round_up
from lpcompile.ops.launcher import cached
from lpcompile.ops.wgmma_contract import sum_by_steps, sum_fast, sum_lines
from lpcompile.ops.wgmma_store import store

NONE, ROWS, COLUMNS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what groups lie along
LINE = 128  # bytes of a row in a tile: the widest that shared memory swizzles
LAYOUTS = {n: gl.NVMMASharedLayout(LINE, 8 * n, rank=2) for n in (1, 2, 4)}  # n bytes an element
SCALES = gl.NVMMASharedLayout(0, 32, rank=1)  # of a line of them; to make a layout takes 2 us
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)  # warpgroups
STRIP = gl.constexpr(8)  # tiles down before the next column, so that L2 holds what they share


@gluon.jit
def extent(offs_ptr, group, M, K, GROUPS: gl.constexpr):
    """A group: its first row, how many it has, and where its contraction begins and ends."""
    if GROUPS == NONE:
        return 0, M, 0, K
    else:  # noqa: RET505  (Triton compiles what follows a return)
        end = gl.load(offs_ptr + group)
        begin = gl.load(offs_ptr + group - 1, mask=group > 0, other=0)
        if GROUPS == ROWS:
            return begin, end - begin, 0, K
        else:  # noqa: RET505
            return 0, M, begin, end


@gluon.jit
def place(index, down, across, BM: gl.constexpr, BN: gl.constexpr):
    """The first row and column of a tile of a group that is ``down`` by ``across`` tiles."""
    strip = index // (STRIP * across)
    index = index % (STRIP * across)
    height = gl.minimum(down - strip * STRIP, STRIP)
    return (strip * STRIP + index % height) * BM, index // height * BN


# Below, the loop over groups is a while: Triton drops the variable of a for that only bounds an
# inner loop (3.6 and 3.7), and every program would begin each group with the same tile.


@gluon.jit
def load(
    descs, offs_ptr, bufs, sizes, GROUPS: gl.constexpr, LINES: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """The warp that loads: every step of every tile of this program, as buffers become empty."""
    a_desc, b_desc, b_scale_desc = descs
    a_bufs, b_bufs, b_scale_bufs, full, empty = bufs
    E, M, N, K = sizes
    STAGES: gl.constexpr = a_bufs.shape[0]
    BM: gl.constexpr = a_bufs.shape[1 + TURNED[0]]
    BN: gl.constexpr = b_bufs.shape[1 + TURNED[1]]
    BK: gl.constexpr = a_bufs.shape[2 - TURNED[0]]
    SCALES: gl.constexpr = 4 * BN * LINES
    BYTES: gl.constexpr = (BM + BN) * BK * a_bufs.dtype.primitive_bitwidth // 8 + SCALES
    across = gl.cdiv(N, BN)
    step, group, upcoming = 0, 0, gl.program_id(0)
    while group < E:
        row, rows, k_begin, k_end = extent(offs_ptr, group, M, K, GROUPS)
        down = gl.cdiv(rows, BM)
        b_row, b_block = 0, 0
        if GROUPS == ROWS:
            b_row, b_block = group * (K if TURNED[1] else N), group * gl.cdiv(K, BK)
        for index in range(upcoming, down * across, gl.num_programs(0)):
            m, n = place(index, down, across, BM, BN)
            for k in range(k_begin, k_end, BK):
                stage = step % STAGES
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
                mbarrier.expect(ready, BYTES)
                a_at, b_at = [row + m, k], [b_row + n, k]
                if TURNED[0]:
                    a_at = [k, row + m]
                if TURNED[1]:
                    b_at = [b_row + k, n]
                tma.async_copy_global_to_shared(a_desc, a_at, ready, a_bufs.index(stage))
                tma.async_copy_global_to_shared(b_desc, b_at, ready, b_bufs.index(stage))
                if LINES:  # scales[K / 128, N] as one line
                    at = (b_block + k // BK) * N + n
                    to = b_scale_bufs.index(stage)
                    tma.async_copy_global_to_shared(b_scale_desc, [at], ready, to)
                step += 1
            upcoming += gl.num_programs(0)
        upcoming -= down * across
        group += 1


@gluon.jit
def multiply(
    arrays, scaling, offs_ptr, bufs, sizes, HOW: gl.constexpr, TURNED: gl.constexpr,
    WG: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG of two: its half of every tile of this program."""
    GROUPS: gl.constexpr = HOW[0]
    FAST: gl.constexpr = HOW[1]
    LINES: gl.constexpr = HOW[2]
    SQUARE: gl.constexpr = HOW[3]
    NARROW: gl.constexpr = HOW[4]
    a_scale_ptr, b_scale_ptr, strides = scaling
    a_bufs, b_bufs, _, _, _ = bufs
    E, M, N, K = sizes
    BM: gl.constexpr = a_bufs.shape[1 + TURNED[0]]
    BN: gl.constexpr = b_bufs.shape[1 + TURNED[1]]
    BK: gl.constexpr = a_bufs.shape[2 - TURNED[0]]
    MW: gl.constexpr = BM if LINES else BM // 2
    across = gl.cdiv(N, BN)
    step, group, upcoming = 0, 0, gl.program_id(0)
    while group < E:
        row, rows, k_begin, k_end = extent(offs_ptr, group, M, K, GROUPS)
        down = gl.cdiv(rows, BM)
        block, steps = k_begin // BK, gl.cdiv(k_end - k_begin, BK)
        base = group * M if GROUPS == COLUMNS else row
        a_scales = a_scale_ptr + group * strides[0] + row * strides[1]
        of = (a_scales, b_scale_ptr + group * strides[3], strides)
        for index in range(upcoming, down * across, gl.num_programs(0)):
            m, n = place(index, down, across, BM, BN)
            if LINES:
                tile = (m, rows, n + WG * 128, N)
                parts = sum_lines(bufs, of, tile, block, step, steps, WG)
            else:
                tile = (m + WG * MW, rows, n, N)
                if FAST:
                    parts = sum_fast(bufs, of, tile, step, steps, BN, TURNED, WG)
                else:
                    parts = sum_by_steps(bufs, of, tile, block, step, steps, NARROW, SQUARE, WG)
            store(parts, arrays, base, tile, MW, WG)
            step += steps
            upcoming += gl.num_programs(0)
        upcoming -= down * across
        group += 1
    tma.store_wait(0)


@cached
@gluon.jit(do_not_specialize=["E", "M"])
def kernel(
    a_desc,
    b_desc,
    b_scale_desc,
    out_desc,
    a_scale_ptr,
    b_scale_ptr,
    offs_ptr,
    out_ptr,
    addend_ptr,
    E,
    M,
    N,
    K,
    a_stride_e,  # of the scales: from a group to the next, from a row, from a block along K
    a_stride,
    a_stride_k,
    b_stride_e,
    b_stride,
    b_stride_k,
    GROUPS: gl.constexpr,
    FAST: gl.constexpr,
    LINES: gl.constexpr,  # of scales: blocks of 1x128 in both operands
    SQUARE: gl.constexpr,  # 1x128 in a, 128x128 in b
    NARROW: gl.constexpr,  # a tile may have 128 columns or fewer
    A_TURNED: gl.constexpr,  # the contraction is the first dimension of its tiles
    B_TURNED: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,  # of a result, on their way: both warpgroups'
):
    TURNED: gl.constexpr = (A_TURNED, B_TURNED)
    BN: gl.constexpr = b_desc.block_type.shape[B_TURNED]
    a_bufs = gl.allocate_shared_memory(
        a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout
    )
    b_bufs = gl.allocate_shared_memory(
        b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout
    )
    b_scale_bufs = b_bufs  # not read but as scales
    if LINES:
        b_scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BN], b_scale_desc.layout)
    element: gl.constexpr = out_ptr.dtype.element_ty
    lines: gl.constexpr = gl.NVMMASharedLayout(128, element.primitive_bitwidth, 2)
    out_bufs = gl.allocate_shared_memory(element, [CHUNKS, 64, 64], lines)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    descs = (a_desc, b_desc, b_scale_desc)
    bufs = (a_bufs, b_bufs, b_scale_bufs, full, empty)
    sizes = (E, M, N, K)
    arrays = (out_ptr, addend_ptr, out_desc, out_bufs)
    strides = (a_stride_e, a_stride, a_stride_k, b_stride_e, b_stride, b_stride_k)
    scaling = (a_scale_ptr, b_scale_ptr, strides)
    # Of a thread of the second warpgroup, which leaves the first as many, and of the loading warp.
    REGISTERS: gl.constexpr = [240, 24] if LINES else [232, 40]
    HOW: gl.constexpr = (GROUPS, FAST, LINES, SQUARE, NARROW)
    gl.warp_specialize(
        [
            (multiply, (arrays, scaling, offs_ptr, bufs, sizes, HOW, TURNED, FIRST)),
            (multiply, (arrays, scaling, offs_ptr, bufs, sizes, HOW, TURNED, SECOND)),
            (load, (descs, offs_ptr, bufs, sizes, GROUPS, LINES, TURNED)),
        ],
        [4, 1],
        REGISTERS,
    )


def fill(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor | None,
    out: Tensor,
    fast_accum: bool,
    addend: Tensor | None = None,
) -> None:
    """Multiply into ``out``; ``grouped_gemm.suits_warpgroups`` says of what."""
    (M, K), N = a.shape, b.shape[-2]
    groups = 0 if offs is None else 1 if b.dim() == 3 else 2
    blocked = a_scale.dim() == 2
    square = blocked and b_scale.shape[-2] != N
    lines = blocked and not square
    fast = fast_accum and not blocked
    narrow = round_up(N, 256) != round_up(N, 128)
    # The wider tile reads less of shared memory; not where it is wider than the result.
    BM, BN = (256, 128) if narrow and fast else (128, 256)
    # Of x.T as x lies, the contraction is not last in memory; bf16 is multiplied so too.
    turned = tuple(int(x.stride(-1) != 1) for x in (a, b))
    b_scale_desc = None
    if lines:
        flat = b_scale.mT.reshape(-1)
        b_scale_desc = TensorDescriptor(flat, [flat.numel()], [1], [BN], SCALES)
    of_a = grouped_gemm.strides(a_scale, a, groups == 2)
    of_b = grouped_gemm.strides(b_scale, b, groups == 2)
    # Of the 227 KiB a step of operands takes 48, and a tile of the result 64 in bf16, of which half
    # may wait for the other. Three steps cost tiles of 256 rows more (2% to 4%) than that gains.
    stages, num_chunks = (4, 8) if BM == 256 else (3, 16)
    kernel[(device.processors(a),)](
        _tiles(a, BM), _tiles(b, BN), b_scale_desc, _chunks(out), a_scale, b_scale, offs, out,
        addend, 1 if offs is None else offs.shape[0], M, N, K, *of_a, *of_b,
        groups, fast, lines, square, narrow, *turned, stages, num_chunks // out.element_size(),
        num_warps=4,
    )  # fmt: skip


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """x[..., R, C] in tiles of ``rows`` by 128 bytes along C, as they lie in memory."""
    size = x.element_size()
    shape = [rows, LINE // size]
    if x.stride(-1) != 1:
        x, shape = x.mT, shape[::-1]
    return _descriptor(x.flatten(0, -2), shape)


def _chunks(out: Tensor) -> TensorDescriptor | None:
    """out[..., M, N] in chunks of 64 x 64, if TMA can store it: rows of whole vectors."""
    whole = out.shape[-1] * out.element_size() % ALIGN == 0 and out.data_ptr() % ALIGN == 0
    return _descriptor(out.flatten(0, -2), [64, 64]) if whole else None


def _descriptor(x: Tensor, shape: list[int]) -> TensorDescriptor:
    layout = LAYOUTS[x.element_size()]
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], shape, layout)
