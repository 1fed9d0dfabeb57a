"""Multiply on Hopper's warpgroups, a matrix or group by group, in Gluon:

    a[M, K],  b[N, K]             -> [M, N]
    a[T, K],  b[E, N, K], offs[E] -> [T, N]      the rows of group e with b[e]
    a[M, Tp], b[N, Tp],   offs[E] -> [E, M, N]   the columns of group e of both

Operands are FP8, or bf16, which may lie in memory the other way round, with scales as
``grouped_gemm`` takes them. In the last form groups begin at multiples of ``groups.ALIGN``, so that
a step of the contraction is of one group.

The kernel is persistent, and its warps are specialized: one brings tiles to shared memory by TMA,
as long as buffers are empty; two warpgroups multiply them, each its own part of a tile, so that one
multiplies while the other adds, scales or stores. Every warp finds the tiles of its program alone.

Hopper's FP8 tensor cores keep about 14 bits of a sum. ``fast_accum`` leaves all of K to them; else,
and always under scales of blocks, the sum of 128 elements is added in fp32. A thread's registers
hold one accumulator of 64x256 and no second, so that this goes in halves of 64x128.

What was measured against CUTLASS and cuBLASLt is in docs/benchmarks.md.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lpcompile.ops import device, grouped_gemm
from lpcompile.ops.define import round_up
from lpcompile.ops.launcher import cached
from lpcompile.ops.wgmma_store import scales_of, store

NONE, ROWS, COLUMNS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what groups lie along
LINE = 128  # bytes of a row in a tile: the widest that shared memory swizzles
LAYOUTS = {n: gl.NVMMASharedLayout(LINE, 8 * n, rank=2) for n in (1, 2)}  # of n bytes an element
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
    descs, offs_ptr, bufs, sizes, GROUPS: gl.constexpr, BLOCKED: gl.constexpr,
    SQUARE: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """The warp that loads: every step of every tile of this program, as buffers become empty."""
    a_desc, b_desc, b_scale_desc = descs
    a_bufs, b_bufs, b_scale_bufs, full, empty = bufs
    E, M, N, K = sizes
    STAGES: gl.constexpr = a_bufs.shape[0]
    BM: gl.constexpr = a_bufs.shape[1 + TURNED[0]]
    BN: gl.constexpr = b_bufs.shape[1 + TURNED[1]]
    BK: gl.constexpr = a_bufs.shape[2 - TURNED[0]]
    SCALES: gl.constexpr = 4 * BN * (BLOCKED and not SQUARE)
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
                if BLOCKED and not SQUARE:  # scales[K / 128, N] as one line
                    at = (b_block + k // BK) * N + n
                    to = b_scale_bufs.index(stage)
                    tma.async_copy_global_to_shared(b_scale_desc, [at], ready, to)
                step += 1
            upcoming += gl.num_programs(0)
        upcoming -= down * across
        group += 1


@gluon.jit
def rows_of(bufs, stage, BEGIN: gl.constexpr, NUM: gl.constexpr):
    """NUM rows of a tile in shared memory, from BEGIN."""
    return bufs.index(stage).slice(BEGIN, NUM, dim=0)


@gluon.jit
def contract_fast(
    bufs, step, steps, MW: gl.constexpr, WG: gl.constexpr, TURNED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """The sum [MW, BN] over all steps, in the tensor cores' own accumulator."""
    a_bufs, b_bufs, _, full, empty = bufs
    STAGES: gl.constexpr = a_bufs.shape[0]
    BN: gl.constexpr = b_bufs.shape[1 + TURNED[1]]
    acc = warpgroup_mma_init(gl.zeros([MW, BN], gl.float32, layout))
    for i in range(0, steps):
        stage = (step + i) % STAGES
        mbarrier.wait(full.index(stage), (step + i) // STAGES & 1)
        a, b = a_bufs.index(stage), b_bufs.index(stage)
        if TURNED[0]:
            a = a.permute((1, 0))
        if not TURNED[1]:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a.slice(WG * MW, MW, dim=0), b, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        if i > 0:  # the step before is done
            mbarrier.arrive(empty.index((step + i - 1) % STAGES), count=1)
    total = warpgroup_mma_wait(0, deps=(acc,))
    if steps > 0:
        mbarrier.arrive(empty.index((step + steps - 1) % STAGES), count=1)
    return total


@gluon.jit
def add_step(
    acc,
    part,
    bufs,
    a_scale,
    b_scale,
    stage,
    A: gl.constexpr,
    B: gl.constexpr,
    BLOCKED: gl.constexpr,
    SQUARE: gl.constexpr,
    layout: gl.constexpr,
):
    """Acc[64, 128] plus one step of rows of a from A and of b from B; and the step's sum.

    ``part``, any [64, 128], gives it its registers, and the wait, which has nothing to wait for,
    keeps the addition before the next step: ptxas would otherwise keep two sums and spill.
    """
    a_bufs, b_bufs, b_scale_bufs, _, _ = bufs
    a, b = rows_of(a_bufs, stage, A, 64), rows_of(b_bufs, stage, B, 128).permute((1, 0))
    part = warpgroup_mma(a, b, part, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, deps=(part,))
    if BLOCKED:
        if SQUARE:
            acc += part * gl.expand_dims(a_scale * b_scale, 1)
        else:
            b_scale = rows_of(b_scale_bufs, stage, B, 128).load(gl.SliceLayout(0, layout))
            acc += part * (gl.expand_dims(a_scale, 1) * gl.expand_dims(b_scale, 0))
    else:
        acc += part
    return warpgroup_mma_wait(0, deps=(acc,)), part


@gluon.jit
def contract(
    bufs,
    a_scales,  # of both parts: [64], of the first step
    b_scales,  # of both parts, where a block of 128x128 has one
    strides,  # of both from step to step
    step,
    steps,
    MW: gl.constexpr,
    WG: gl.constexpr,
    BLOCKED: gl.constexpr,
    SQUARE: gl.constexpr,
    layout: gl.constexpr,
):
    """The sums [64, 128] of both parts of a warpgroup's [MW, BN], every step added in fp32."""
    a_bufs, b_bufs, _, full, empty = bufs
    STAGES: gl.constexpr = a_bufs.shape[0]
    A: gl.constexpr = WG * MW + MW - 64  # where the second part begins
    B: gl.constexpr = b_bufs.shape[1] - 128
    acc0 = gl.zeros([64, 128], gl.float32, layout)
    acc1, part = acc0, acc0
    a_scale0 = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
    a_scale1 = a_scale0
    b_scale0, b_scale1 = 0.0, 0.0
    for i in range(0, steps):
        stage = (step + i) % STAGES
        if BLOCKED:
            a_scale0 = gl.load(a_scales[0] + i * strides[0])
            a_scale1 = gl.load(a_scales[1] + i * strides[0])
        if SQUARE:
            b_scale0 = gl.load(b_scales[0] + i * strides[1])
            b_scale1 = gl.load(b_scales[1] + i * strides[1])
        mbarrier.wait(full.index(stage), (step + i) // STAGES & 1)
        acc0, part = add_step(
            acc0, part, bufs, a_scale0, b_scale0, stage, WG * MW, 0, BLOCKED, SQUARE, layout
        )
        acc1, part = add_step(
            acc1, part, bufs, a_scale1, b_scale1, stage, A, B, BLOCKED, SQUARE, layout
        )
        mbarrier.arrive(empty.index(stage), count=1)
    return acc0, acc1


@gluon.jit
def multiply(
    arrays, strides, bufs, sizes, GROUPS: gl.constexpr, FAST: gl.constexpr, BLOCKED: gl.constexpr,
    SQUARE: gl.constexpr, TURNED: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG of two: its half of the rows of every tile of this program."""
    out_ptr, addend_ptr, a_scale_ptr, b_scale_ptr, offs_ptr = arrays
    a_stride_e, a_stride, a_stride_k, b_stride_e, b_stride, b_stride_k = strides
    a_bufs, b_bufs, _, _, _ = bufs
    E, M, N, K = sizes
    BM: gl.constexpr = a_bufs.shape[1 + TURNED[0]]
    BN: gl.constexpr = b_bufs.shape[1 + TURNED[1]]
    BK: gl.constexpr = a_bufs.shape[2 - TURNED[0]]
    MW: gl.constexpr = BM // 2
    KI: gl.constexpr = 256 // a_bufs.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN if FAST else 128, KI])
    across = gl.cdiv(N, BN)
    step, group, upcoming = 0, 0, gl.program_id(0)
    while group < E:
        row, rows, k_begin, k_end = extent(offs_ptr, group, M, K, GROUPS)
        down = gl.cdiv(rows, BM)
        steps = gl.cdiv(k_end - k_begin, BK)
        base = group * M if GROUPS == COLUMNS else row
        a_scales = a_scale_ptr + group * a_stride_e + row * a_stride
        b_scales = b_scale_ptr + group * b_stride_e
        to, by = (out_ptr, addend_ptr), ((a_scales, b_scales), (a_stride, b_stride))
        for index in range(upcoming, down * across, gl.num_programs(0)):
            m, n = place(index, down, across, BM, BN)
            m += WG * MW
            if FAST:
                scales = scales_of(by[0], by[1], m, rows, n, N, MW, BN, BLOCKED, layout)
                acc = contract_fast(bufs, step, steps, MW, WG, TURNED, layout)
                store(acc, scales, to, base, m, rows, n, N, BLOCKED, layout)
            else:
                m1, n1 = m + MW - 64, n + BN - 128  # the second part
                scales = scales_of(by[0], by[1], m, rows, n, N, 64, 128, BLOCKED, layout)
                scales1 = scales_of(by[0], by[1], m1, rows, n1, N, 64, 128, BLOCKED, layout)
                r = gl.arange(0, 64, gl.SliceLayout(1, layout))
                first = a_scales + k_begin // BK * a_stride_k
                by_row = (
                    first + gl.minimum(m + r, rows - 1) * a_stride,
                    first + gl.minimum(m1 + r, rows - 1) * a_stride,
                )
                squares = (
                    b_scales + n // 128 * b_stride,
                    b_scales + gl.minimum(n1, N - 1) // 128 * b_stride,
                )
                along_k = (a_stride_k, b_stride_k)
                acc, acc1 = contract(
                    bufs, by_row, squares, along_k, step, steps, MW, WG, BLOCKED, SQUARE, layout
                )
                store(acc, scales, to, base, m, rows, n, N, BLOCKED, layout)
                store(acc1, scales1, to, base, m1, rows, n1, N, BLOCKED, layout)
            step += steps
            upcoming += gl.num_programs(0)
        upcoming -= down * across
        group += 1


@cached
@gluon.jit(do_not_specialize=["E", "M"])
def kernel(
    a_desc,
    b_desc,
    b_scale_desc,
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
    BLOCKED: gl.constexpr,
    SQUARE: gl.constexpr,  # of b's scales: 128 rows share one
    A_TURNED: gl.constexpr,  # the contraction is the first dimension of its tiles
    B_TURNED: gl.constexpr,
    STAGES: gl.constexpr,
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
    if BLOCKED and not SQUARE:
        b_scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BN], b_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    descs = (a_desc, b_desc, b_scale_desc)
    bufs = (a_bufs, b_bufs, b_scale_bufs, full, empty)
    sizes = (E, M, N, K)
    arrays = (out_ptr, addend_ptr, a_scale_ptr, b_scale_ptr, offs_ptr)
    strides = (a_stride_e, a_stride, a_stride_k, b_stride_e, b_stride, b_stride_k)
    gl.warp_specialize(
        [
            (
                multiply,
                (arrays, strides, bufs, sizes, GROUPS, FAST, BLOCKED, SQUARE, TURNED, FIRST),
            ),
            (
                multiply,
                (arrays, strides, bufs, sizes, GROUPS, FAST, BLOCKED, SQUARE, TURNED, SECOND),
            ),
            (load, (descs, offs_ptr, bufs, sizes, GROUPS, BLOCKED, SQUARE, TURNED)),
        ],
        [4, 1],
        [232, 40],  # registers of a thread; 232 are left to the first warpgroup
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
    # The wider tile reads less of shared memory; not where it is wider than the result.
    BM, BN = (128, 256) if round_up(N, 256) == round_up(N, 128) else (256, 128)
    # Of x.T as x lies, the contraction is not last in memory; bf16 is multiplied so too.
    turned = tuple(int(x.stride(-1) != 1) for x in (a, b))
    b_scale_desc = None
    if blocked and not square:
        flat = b_scale.mT.reshape(-1)
        b_scale_desc = TensorDescriptor(flat, [flat.numel()], [1], [BN], SCALES)
    of_a = grouped_gemm.strides(a_scale, a, groups == 2)
    of_b = grouped_gemm.strides(b_scale, b, groups == 2)
    kernel[(device.processors(a),)](
        _tiles(a, BM), _tiles(b, BN), b_scale_desc, a_scale, b_scale, offs, out,
        addend, 1 if offs is None else offs.shape[0], M, N, K, *of_a, *of_b,
        groups, fast_accum and not blocked, blocked, square, *turned,
        4 if out.element_size() == 2 else 3,
        num_warps=4,
    )  # fmt: skip


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """x[..., R, C] in tiles of ``rows`` by 128 bytes along C, as they lie in memory."""
    size = x.element_size()
    shape = [rows, LINE // size]
    if x.stride(-1) != 1:
        x, shape = x.mT, shape[::-1]
    flat = x.flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), [flat.stride(0), 1], shape, LAYOUTS[size])
