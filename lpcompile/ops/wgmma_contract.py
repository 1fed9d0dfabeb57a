"""What a warpgroup of ``wgmma`` sums of a tile over the whole contraction: four parts of 64 x 64.

Hopper's FP8 tensor cores keep about 14 bits of a sum. ``sum_fast`` leaves all of K to them; else
the sum of every 128 elements is added in fp32, under scales of blocks where there are any.

A thread holds its elements of 64 x 256, or of 128 x 128, in 128 registers, and about 100 beside.
``sum_by_steps`` has two products of 64 x 64 there, so that one is multiplied while the other is
added, and a's tile: read from shared memory for every part anew, it would take all that this gives.
Under a scale for every column, reading those from shared memory, every thread its own, is what
bounds the GEMM: ``sum_lines`` has them there, and one product of 64 x 128.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from lpcompile.ops.wgmma_store import PART, cut, halves, joined, scaled, scales_of

# How a sum [64, 128] lies.
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))


@gluon.jit
def sum_fast(
    bufs, scaling, tile, step, steps, BN: gl.constexpr, TURNED: gl.constexpr, WG: gl.constexpr
):
    """The parts of [128, 128] or [64, 256], summed in the tensor cores' own accumulator."""
    a_bufs, b_bufs, _, full, empty = bufs
    STAGES: gl.constexpr = a_bufs.shape[0]
    MW: gl.constexpr = a_bufs.shape[1 + TURNED[0]] // 2
    KI: gl.constexpr = 256 // a_bufs.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, KI])
    scales = scales_of(scaling, tile, MW, BN, layout)
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
    return cut(scaled(total, scales, layout))


@gluon.jit
def begin(part, a, bufs, stage, C: gl.constexpr):
    """Begin one step of a with b's columns from C, in the registers of ``part``, any [64, 64]."""
    b = bufs[1].index(stage).slice(C, 64, dim=0).permute((1, 0))
    return warpgroup_mma(a, b, part, use_acc=False, is_async=True)


@gluon.jit
def add(acc, part, a_scale, b_scale, SQUARE: gl.constexpr, LEFT: gl.constexpr):
    """Acc[64, 64] plus a step's part of it, while LEFT more are multiplied.

    The wait has nothing to wait for. It keeps the addition before what the part's registers are
    used for next: ptxas would otherwise copy them, and multiply nothing meanwhile.
    """
    acc += part * gl.expand_dims(a_scale * b_scale, 1) if SQUARE else part
    return warpgroup_mma_wait(LEFT, deps=(acc,))


@gluon.jit
def add_steps(
    bufs,
    a_scales,  # [64] of the first step
    b_scales,  # of both halves of the columns
    strides,  # of both from step to step
    step,
    steps,
    WIDE: gl.constexpr,  # else 128 of the 256 columns are past the last, and zeros
    SQUARE: gl.constexpr,
    WG: gl.constexpr,
):
    """The four parts of [64, 256], every step added in fp32, by blocks of 128x128 where SQUARE."""
    a_bufs, b_bufs, _, full, empty = bufs
    STAGES: gl.constexpr = a_bufs.shape[0]
    in_registers: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PART, k_width=4)
    acc0 = gl.zeros([64, 64], gl.float32, PART)
    acc1, acc2, acc3, even, odd = acc0, acc0, acc0, acc0, acc0
    next_a = gl.zeros([64], gl.float32, gl.SliceLayout(1, PART))
    next_left, next_right = 0.0, 0.0
    if SQUARE:
        next_a = gl.load(a_scales, mask=steps > 0, other=0.0)
        next_left = gl.load(b_scales[0], mask=steps > 0, other=0.0)
        next_right = gl.load(b_scales[1], mask=steps > 0, other=0.0)
    for i in range(0, steps):
        stage = (step + i) % STAGES
        a_scale, left, right = next_a, next_left, next_right
        if SQUARE:
            upcoming = gl.minimum(i + 1, steps - 1)
            next_a = gl.load(a_scales + upcoming * strides[0])
            next_left = gl.load(b_scales[0] + upcoming * strides[1])
            next_right = gl.load(b_scales[1] + upcoming * strides[1])
        mbarrier.wait(full.index(stage), (step + i) // STAGES & 1)
        a = a_bufs.index(stage).slice(WG * 64, 64, dim=0).load(in_registers)
        first = begin(even, a, bufs, stage, 0)
        second = begin(odd, a, bufs, stage, 64)
        even = warpgroup_mma_wait(1, deps=(first,))
        acc0 = add(acc0, even, a_scale, left, SQUARE, 1)
        if WIDE:
            first = begin(even, a, bufs, stage, 128)
            odd = warpgroup_mma_wait(1, deps=(second,))
            acc1 = add(acc1, odd, a_scale, left, SQUARE, 1)
            second = begin(odd, a, bufs, stage, 192)
            even = warpgroup_mma_wait(1, deps=(first,))
            acc2 = add(acc2, even, a_scale, right, SQUARE, 1)
            odd = warpgroup_mma_wait(0, deps=(second,))
            acc3 = add(acc3, odd, a_scale, right, SQUARE, 0)
        else:
            odd = warpgroup_mma_wait(0, deps=(second,))
            acc1 = add(acc1, odd, a_scale, left, SQUARE, 0)
        mbarrier.arrive(empty.index(stage), count=1)
    return acc0, acc1, acc2, acc3


@gluon.jit
def sum_by_steps(
    bufs, scaling, tile, block, step, steps, NARROW: gl.constexpr, SQUARE: gl.constexpr,
    WG: gl.constexpr,
):  # fmt: skip
    """The parts of [64, 256], every step added in fp32; ``block``: of the scales, the first."""
    a_scales, b_scales, strides = scaling
    m, rows, n, N = tile
    r = gl.minimum(m + gl.arange(0, 64, gl.SliceLayout(1, PART)), rows - 1)
    of_a = a_scales + block * strides[2] + r * strides[1]
    right = gl.minimum(n + 128, N - 1)
    of_b = (b_scales + n // 128 * strides[4], b_scales + right // 128 * strides[4])
    along_k = (strides[2], strides[5])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 32])
    if not SQUARE:
        scales = scales_of(scaling, tile, 64, 256, layout)
    # What is known when this is compiled may not be a condition of values: Triton 3.6 fails.
    if not NARROW:  # noqa: SIM114
        parts = add_steps(bufs, of_a, of_b, along_k, step, steps, True, SQUARE, WG)
    elif n + 128 < N:
        parts = add_steps(bufs, of_a, of_b, along_k, step, steps, True, SQUARE, WG)
    else:
        parts = add_steps(bufs, of_a, of_b, along_k, step, steps, False, SQUARE, WG)
    if not SQUARE:
        acc = joined(joined(parts[0], parts[1]), joined(parts[2], parts[3]))
        acc = gl.convert_layout(acc, layout, assert_trivial=True)
        parts = cut(scaled(acc, scales, layout))
    return parts


@gluon.jit
def sum_lines(bufs, scaling, tile, block, step, steps, WG: gl.constexpr):
    """The parts of [128, 128], every step added in fp32, under blocks of 1x128 in both operands.

    Warpgroups lie side by side, so that what a thread reads of the columns' scales serves four of
    its rows and not two.
    """
    a_bufs, b_bufs, lines, full, empty = bufs
    a_scales, _, strides = scaling
    m, rows, _, _ = tile
    STAGES: gl.constexpr = a_bufs.shape[0]
    r = m + gl.arange(0, 64, gl.SliceLayout(1, HALF))
    upper_at = gl.minimum(r, rows - 1) * strides[1]
    lower_at = gl.minimum(r + 64, rows - 1) * strides[1]
    upper = gl.zeros([64, 128], gl.float32, HALF)
    lower, part = upper, upper
    for i in range(0, steps):
        stage = (step + i) % STAGES
        upper_scale = gl.load(a_scales + (upper_at + (block + i) * strides[2]))
        lower_scale = gl.load(a_scales + (lower_at + (block + i) * strides[2]))
        mbarrier.wait(full.index(stage), (step + i) // STAGES & 1)
        a = a_bufs.index(stage)
        b = b_bufs.index(stage).slice(WG * 128, 128, dim=0).permute((1, 0))
        part = warpgroup_mma(a.slice(0, 64, dim=0), b, part, use_acc=False, is_async=True)
        line = lines.index(stage).slice(WG * 128, 128, dim=0).load(gl.SliceLayout(0, HALF))
        part = warpgroup_mma_wait(0, deps=(part,))
        upper += part * gl.expand_dims(line, 0) * gl.expand_dims(upper_scale, 1)
        upper = warpgroup_mma_wait(0, deps=(upper,))  # as in ``add``
        part = warpgroup_mma(a.slice(64, 64, dim=0), b, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        lower += part * gl.expand_dims(line, 0) * gl.expand_dims(lower_scale, 1)
        lower = warpgroup_mma_wait(0, deps=(lower,))
        mbarrier.arrive(empty.index(stage), count=1)
    upper_left, upper_right = halves(upper, 1)
    lower_left, lower_right = halves(lower, 1)
    return upper_left, upper_right, lower_left, lower_right
