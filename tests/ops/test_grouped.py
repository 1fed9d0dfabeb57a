"""Ragged groups: every group alone, rows past the last, and the GPU's kernels at random shapes."""

import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.torch_version import TorchVersion as Version

from lpcompile import Operand, gemm, gemm_grouped, ops
from lpcompile.ops import grouped_gemm, groups, hadamard, philox, quantize_nvfp4
from lpcompile.ops.define import per_column, round_up, same_bits
from lpcompile.recipes import RECIPES

E4M3 = torch.float8_e4m3fn
BLOCK = grouped_gemm.BLOCK
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ragged = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.lists(st.sampled_from([0, 0, 1, 7, 15, 16, 17, 33, 128, 150]), min_size=1, max_size=6)


def ends(counts, device="cpu"):
    return torch.tensor(counts, device=device).cumsum(0).int()


def tokens(num, channels, device="cpu"):
    return torch.randn(num, channels, device=device, dtype=torch.bfloat16)


def by_rows(x, offs):
    return ops.quantize_fp8_grouped_t.op(x, ops.amax_column_grouped.op(x, offs), offs, E4M3, True)


def by_tensor(x, offs):
    return ops.quantize_fp8_grouped_t.op(x, ops.amax_tensor_grouped.op(x, offs), offs, E4M3, False)


def by_blocks(x, offs):
    return ops.quantize_fp8_block_grouped_t.op(x, offs, E4M3, True)


MICRO = {
    "mxfp8": Operand("mxfp8", (1, 32)),
    "mxfp8_floor": Operand("mxfp8_floor", (1, 32)),
    "nvfp4": Operand("nvfp4", (1, 16)),
    "nvfp4_hadamard": Operand("nvfp4", (1, 16), hadamard=16),
}


def by_micro(x, offs, operand):
    quantized, padded = gemm_grouped.quantize_groups_t(x, operand, offs)
    return quantized.values, quantized.scales, padded


def alone(x):
    """What ``by_rows`` makes of one group, through the ops for one matrix."""
    return ops.quantize_fp8_row_t.op(x, ops.amax_column.op(x), E4M3, True)


@ragged
@given(sizes, st.integers(0, 20))
def test_every_group_is_quantized_as_it_would_be_alone(counts, past):
    offs = ends(counts)
    x = tokens(sum(counts) + past, 24)
    values, scales, padded = by_rows(x, offs)
    blocks, block_scales, block_padded = by_blocks(x, offs)
    filled = torch.zeros_like(values, dtype=torch.bool)
    for e, rows in enumerate(groups.slices(offs)):
        start = groups.slices(padded)[e].start
        expected, of_group = alone(x[rows])
        to = slice(start, start + expected.shape[1])
        assert same_bits((values[:, to], scales[e * 24 : (e + 1) * 24]), (expected, of_group)) == ""
        filled[:, to] = True
        start = groups.slices(block_padded)[e].start
        expected, of_group = ops.quantize_fp8_block_t.op(x[rows], E4M3, True)
        made = blocks[:, start : start + expected.shape[1]]
        at = start // BLOCK
        of_blocks = block_scales[:, at : at + of_group.shape[1]]
        assert same_bits((made, of_blocks), (expected, of_group)) == ""
    assert not values.float()[~filled].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operand", MICRO.values(), ids=MICRO)
@ragged
@given(sizes, st.integers(0, 20))
def test_every_group_in_small_blocks_is_quantized_as_it_would_be_alone(
    device, operand, counts, past
):
    offs = ends(counts, device)
    x = tokens(sum(counts) + past, 24, device)
    x *= 10.0 ** torch.randint(-2, 3, (len(x), 1), device=device)  # so that amaxes differ
    x[sum(counts) :] = torch.nan
    made, padded = gemm_grouped.quantize_groups_t(x, operand, offs)
    per_byte = 1 if made.tensor_amax is None else 2
    filled = torch.zeros_like(made.values, dtype=torch.bool)
    for e, rows in enumerate(groups.slices(offs)):
        start = groups.slices(padded)[e].start
        expected = gemm.quantize(x[rows], operand, transpose=True)
        values = slice(start // per_byte, start // per_byte + expected.values.shape[1])
        scales = made.scales[:, start // operand.block[1] :]
        of_group = [made.values[:, values], scales[:, : expected.scales.shape[1]]]
        if made.tensor_amax is not None:
            of_group.append(made.tensor_amax[e : e + 1])
        assert same_bits(of_group, [t for t in expected if t is not None]) == ""
        filled[:, values] = True
    assert not made.values.view(torch.uint8)[~filled].any()


@pytest.mark.parametrize("signs", [None, hadamard.SIGNS])
@ragged
@given(sizes)
def test_a_draw_in_a_group_is_that_of_its_place_in_what_is_made(signs, counts):
    offs, x = ends(counts), tokens(sum(counts), 24)
    amax, seed = ops.amax_group.op(x, offs, signs), torch.tensor([11])
    values, _, padded = ops.quantize_nvfp4_grouped_t.op(x, amax, offs, signs, seed, 3)
    for e, rows in enumerate(groups.slices(offs)):
        to = groups.slices(padded)[e]
        t = x[rows].t() if signs is None else ops.hadamard.op(x[rows], signs)
        c, at = (torch.arange(n)[:, None] for n in t.shape)
        place = c * (2 * values.shape[1]) + to.start + at.t()
        (word, *_) = philox.philox(seed, (place, torch.zeros_like(place), 3, 0))
        expected, _ = quantize_nvfp4.by_blocks(t, amax[e : e + 1], word, 1)
        made = values[:, to.start // 2 : to.stop // 2]
        assert same_bits(made[:, : expected.shape[1]], expected) == ""
        assert not made[:, expected.shape[1] :].any()


@ragged
@given(sizes, st.integers(0, 20))
def test_groups_are_padded_to_where_a_gemm_reads_them(counts, past):
    x, offs = tokens(sum(counts) + past, 8), ends(counts)
    micro = [by_micro(x, offs, operand) for operand in MICRO.values()]
    for made in (by_rows(x, offs), by_blocks(x, offs), *micro):
        assert made[2].diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == [
            round_up(n, groups.ALIGN) for n in counts
        ]
        assert made[2][-1] <= made[0].shape[1] * (2 if made[0].dtype == torch.uint8 else 1)


@ragged
@given(sizes)
def test_the_rows_of_the_last_group_are_all_that_counts(counts):
    offs = ends(counts)
    x = tokens(sum(counts), 16)
    past = torch.cat([x, torch.full((5, 16), torch.nan, dtype=torch.bfloat16)])
    of_group = [partial(ops.amax_group.op, signs=signs) for signs in (None, hadamard.SIGNS)]
    for op in (ops.amax_column_grouped.op, ops.amax_tensor_grouped.op, *of_group):
        assert same_bits(op(past, offs), op(x, offs)) == ""
    micro = [partial(by_micro, operand=operand) for operand in MICRO.values()]
    for quantize in (by_rows, by_tensor, by_blocks, *micro):
        # Tp may be longer with five rows more; what both have is the same, and the rest is zero.
        made, expected = quantize(past, offs), quantize(x, offs)
        width = expected[0].shape[1]
        assert same_bits(made[0][:, :width], expected[0]) == ""
        assert not made[0][:, width:].view(torch.uint8).any()
        assert same_bits(made[2], expected[2]) == ""


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"), reason="its interpreter has no dynamic range()"
)
def test_the_kernels_find_ragged_groups_in_the_interpreter():
    script = Path(__file__).with_name("interpret_groups.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


DROPPED = 2.0**-11  # of the sum of magnitudes, by tensor cores that keep some 14 bits of a sum


def per_group(made, expected, magnitude, offs, bound=0.01):
    """Every column of every group of rows alone.

    A column of a few rows can cancel to next to nothing, where what the accumulators drop shows.
    """
    for e, rows in enumerate(groups.slices(offs)):
        m, x, whole = (t[rows].double() for t in (made, expected, magnitude))
        if not torch.equal(m.isfinite(), x.isfinite()):
            return f"group {e} ({rows}): not finite where it should be"
        error, allowed = (m - x).norm(dim=0), bound * x.norm(dim=0) + DROPPED * whole.norm(dim=0)
        if (error > allowed).any():
            return f"group {e} ({rows}): {int((error > allowed).sum())} columns are wrong"
    return ""


def magnitudes(args):
    """The product of the operands' magnitudes, in fp64."""
    a, a_scale, b, b_scale, *rest = args
    unsigned = 0x77 if a.dtype == torch.uint8 else 0x7F
    a, b = ((t.view(torch.uint8) & unsigned).view(t.dtype) for t in (a, b))
    return ops.scaled_grouped_mm.exact(a, a_scale, b, b_scale, *rest)


def shapes(seed):
    """E, T, N, K and the ends of E ragged groups: some empty, one with half of all tokens."""
    rng = random.Random(seed)
    E = rng.choice([1, 2, 5, 8, 16, 33, 64, 128])
    counts = [0 if rng.random() < 0.2 else rng.randrange(1, 160) for _ in range(E)]
    if seed % 3 == 0:
        counts[rng.randrange(E)] += sum(counts)
    unit = rng.choice([1, 8, 16, 128])
    N, K = (unit * rng.randrange(1, 1 + 640 // unit) for _ in range(2))
    return E, sum(counts) + rng.choice([0, 0, 37]), N, K, counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_each_group_is_under_the_scales_of_its_own_operands(name, device):
    """Groups and experts of magnitudes far apart: another's tensor scale would show."""
    recipe, counts = RECIPES[name], (20, 0, 37, 1, 150)
    offs, N, K, T = ends(counts, device), 48, 72, sum(counts)
    size = 10.0 ** torch.arange(-6, 4, 2, device=device)
    each = size.repeat_interleave(torch.tensor(counts, device=device))[:, None]
    x, dy = tokens(T, K, device), tokens(T, N, device)
    w = (torch.randn(5, N, K, device=device) * size[:, None, None]).bfloat16()
    y = gemm_grouped.grouped_mm(x, w, offs, recipe.fprop)
    dw = gemm_grouped.grouped_mm_t(dy * each.bfloat16(), x, offs, recipe.wgrad)
    exact = torch._grouped_mm(x, w.mT, offs=offs)
    for e, rows in enumerate(groups.slices(offs)):
        true = dy[rows].double().t() @ x[rows].double()
        for made, expected in ((y[rows], exact[rows]), (dw[e], true * size[e])):
            error = (made.double() - expected.double()).norm()
            assert error <= 0.5 * expected.double().norm(), (e, error)


OPERANDS = {
    "row": (ops.quantize_fp8_row.op, ops.quantize_fp8_row.op, by_rows),
    "block": (ops.quantize_fp8_block.op, ops.quantize_fp8_square.op, by_blocks),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("seed", range(40))
def test_every_column_of_every_group_is_right(seed, kind):
    E, T, N, K, counts = shapes(seed)
    offs = ends(counts, "cuda")
    x, dy = tokens(T, K, "cuda"), tokens(T, N, "cuda")
    x[sum(counts) :], dy[sum(counts) :] = torch.nan, torch.inf
    w = torch.randn(E, N, K, device="cuda", dtype=torch.bfloat16)
    of_tokens, of_weight, along_tokens = OPERANDS[kind]
    module = ops.scaled_grouped_mm
    for a, b, fast in ((x, w, True), (dy, w.mT, False)):
        args = (*of_tokens(a, E4M3, True), *of_weight(b, E4M3, True), offs, torch.bfloat16, fast)
        expected = module.exact(*args)
        size = magnitudes(args)
        assert per_group(module.op(*args), expected, size, offs) == ""
        made = module.outputs(*args)
        grouped_gemm.fill_anywhere(*args[:5], made, fast)  # where it is not chosen too
        assert per_group(made, expected, size, offs) == ""
    (a, a_scale, padded), (b, b_scale, _) = along_tokens(dy, offs), along_tokens(x, offs)
    args = (a, a_scale, b, b_scale, padded, torch.bfloat16, False)
    expected = module.exact(*args)
    assert per_column(0.01)(module.op(*args), expected) == ""
    made = module.outputs(*args)
    grouped_gemm.fill_anywhere(*args[:5], made, False)
    assert per_column(0.01)(made, expected) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("seed", range(40))
def test_every_column_of_every_group_in_small_blocks_is_right(seed, name):
    E, T, N, K, counts = shapes(seed)
    offs, recipe = ends(counts, "cuda"), RECIPES[name]
    x, dy = tokens(T, K, "cuda"), tokens(T, N, "cuda")
    x[sum(counts) :], dy[sum(counts) :] = torch.nan, torch.inf
    w = torch.randn(E, N, K, device="cuda", dtype=torch.bfloat16)
    for a, how, transpose in ((x, recipe.fprop, False), (dy, recipe.dgrad, True)):
        lhs = gemm_grouped.quantize_tokens(a, how.lhs, offs)
        rhs = gemm.quantize(w, how.rhs, transpose=transpose)
        args = arguments(lhs, rhs, offs)
        expected = ops.scaled_grouped_mm.exact(*args)
        made = ops.scaled_grouped_mm.op(*args)
        assert per_group(made, expected, magnitudes(args), offs) == ""
    lhs, padded = gemm_grouped.quantize_groups_t(dy, recipe.wgrad.lhs, offs)
    rhs, _ = gemm_grouped.quantize_groups_t(x, recipe.wgrad.rhs, offs)
    args = arguments(lhs, rhs, padded)
    made, expected = ops.scaled_grouped_mm.op(*args), ops.scaled_grouped_mm.exact(*args)
    assert per_column(0.01)(made, expected) == ""


def arguments(a, b, offs):
    """Of ``scaled_grouped_mm``."""
    how = (offs, torch.bfloat16, False, a.tensor_amax, b.tensor_amax)
    return (a.values, a.scales, b.values, b.scales, *how)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_the_quantizers_of_ragged_groups_equal_their_references(seed):
    _, T, _, C, counts = shapes(seed)
    offs, x = ends(counts, "cuda"), tokens(T, C, "cuda")
    x[sum(counts) :] = torch.nan
    for amaxes in (ops.amax_column_grouped, ops.amax_tensor_grouped):
        amax = amaxes.op(x, offs)
        assert same_bits(amax, amaxes.reference(x, offs)) == ""
        args = (x, amax, offs, E4M3, amax.dim() == 2)
        module = ops.quantize_fp8_grouped_t
        assert same_bits(module.op(*args), module.reference(*args)) == ""
    for module in (ops.quantize_fp8_block_grouped_t, ops.quantize_mxfp8_grouped_t):
        args = (x, offs, E4M3, True)
        assert same_bits(module.op(*args), module.reference(*args)) == ""
    for signs in (None, hadamard.SIGNS):
        amax = ops.amax_group.op(x, offs, signs)
        assert same_bits(amax, ops.amax_group.reference(x, offs, signs)) == ""
        for of_draws in (None, torch.tensor([seed], device="cuda")):
            args = (x, amax, offs, signs, of_draws, 2)
            module = ops.quantize_nvfp4_grouped_t
            assert same_bits(module.op(*args), module.reference(*args)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_the_fused_quantizers_of_ragged_groups_equal_their_references(seed):
    _, T, _, C, counts = shapes(seed)
    offs, x = ends(counts, "cuda"), tokens(T, C, "cuda")
    x[sum(counts) :] = torch.nan
    module, args = ops.fused_amax, ([x], "full; i0", ["row0", "group0", "tokens0"], offs)
    row, group, whole = made = module.op(*args)
    assert same_bits(made, module.reference(*args)) == ""
    for amaxes, forms in (
        ([row, group], ["0 row e4m3 pow2 n", "0 row e4m3 pow2 g"]),
        ([whole, whole], ["0 tokens e4m3 fp32 n", "0 tokens e4m3 fp32 g"]),
        ([], ["0 block e4m3 pow2 n", "0 block e4m3 pow2 g"]),
    ):
        module, args = ops.fused_cast, ([x], amaxes, "full; i0", forms, offs)
        assert same_bits(module.op(*args), module.reference(*args)) == ""
