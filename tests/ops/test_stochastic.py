"""Stochastic rounding: unbiased, within the neighbouring grid points, and reproducible."""

import pytest
import torch

from lpcompile import Gemm, Operand, dequantize, gemm, linear, ops, quantize
from lpcompile.ops import fp4, philox

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
DRAWS = 4096
GRID = torch.tensor(fp4.GRID, dtype=torch.float64)
# Ties, grid points, both ends, and values close to a grid point; the 6 makes the block's scale 1.
VALUES = [
    [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6],
    [6, 0, 0.5, 1, 1.5, 2, 3, 4, -0.5, -1, -1.5, -2, -3, -4, 2**-10, -(2**-10)],
    [6, 0.4375, 0.515625, 1.9375, 2.03125, 2.984375, 4.03125, 5.9375, 0.125, 0.3125, 0.625, 0.875]
    + [-0.0625, -1.1875, -3.25, -5.5],
]


def draws(device, op=ops.quantize_nvfp4, seed=1, draw=0):
    """Each of VALUES rounded DRAWS times under a scale of 1: [DRAWS, 48] fp64 on the CPU."""
    x = torch.tensor(VALUES, device=device).flatten().to(torch.bfloat16).expand(DRAWS, -1)
    assert torch.equal(x[0].cpu().double(), torch.tensor(VALUES, dtype=torch.float64).flatten())
    amax, seed = torch.tensor([2688.0], device=device), torch.tensor([seed], device=device)
    if op is ops.quantize_nvfp4_grouped_t:
        offs = torch.tensor([48], device=device, dtype=torch.int32)
        values, scales, _ = op.op(x.t(), amax, offs, None, seed, draw)
    else:
        values, scales = op.op(x.t() if op is ops.quantize_nvfp4_t else x, amax, seed, draw)
    assert bool((scales.float()[:, :3] == 1).all())
    return fp4.unpack(values)[:, :48].double().cpu()


@on_devices
@pytest.mark.parametrize(
    "op",
    [ops.quantize_nvfp4, ops.quantize_nvfp4_t, ops.quantize_nvfp4_grouped_t],
    ids=["plain", "t", "grouped_t"],
)
def test_the_mean_of_4096_draws_is_the_value(op, device):
    x = torch.tensor(VALUES, dtype=torch.float64).flatten()
    below = torch.searchsorted(GRID, x.abs(), right=True) - 1
    low, high = GRID[below], GRID[(below + 1).clamp(max=7)]
    deviation = ((high - x.abs()) * (x.abs() - low)).clamp(min=0).sqrt() / DRAWS**0.5
    error = (draws(device, op).mean(0) - x).abs()
    assert bool((error <= 4 * deviation).all()), (error / deviation).nan_to_num(0)


@on_devices
def test_a_draw_is_one_of_the_two_neighbours_and_both_come_up(device):
    x = torch.tensor(VALUES, dtype=torch.float64).flatten()
    made = draws(device)
    for column, v in zip(made.T, x, strict=True):
        below = int(torch.searchsorted(GRID, v.abs(), right=True)) - 1
        expected = {GRID[below].item()}
        if GRID[below] != v.abs():
            expected.add(GRID[below + 1].item())
        assert set(column.abs().tolist()) == expected
        assert not bool((column * v < 0).any())


@on_devices
def test_draws_of_neighbours_seeds_and_ops_are_uncorrelated(device):
    ties = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
    base = draws(device)[:, ties].abs()
    centred = base - base.mean(0)
    limit = 4.5 / DRAWS**0.5  # of 182 coefficients, 4.5 standard errors
    across = torch.corrcoef(base.T).fill_diagonal_(0)
    assert across.abs().max() < limit
    for other in (draws(device, seed=2), draws(device, draw=1)):
        other = other[:, ties].abs()
        moved = other - other.mean(0)
        between = (centred * moved).sum(0) / (centred.norm(dim=0) * moved.norm(dim=0))
        assert between.abs().max() < limit


@on_devices
def test_a_draw_depends_on_the_logical_element_alone(device):
    x = torch.randn(130, 300, device=device).to(torch.bfloat16)
    amax, seed = x.abs().amax().float().view(1), torch.tensor([3], device=device)
    values, scales = ops.quantize_nvfp4.op(x, amax, seed, 5)
    transposed = x.t().contiguous()
    others = {
        "column-major": ops.quantize_nvfp4.op(transposed.t(), amax, seed, 5),
        "from the transpose": ops.quantize_nvfp4_t.op(transposed, amax, seed, 5),
    }
    for name, made in others.items():
        assert torch.equal(made[0], values), name
        assert torch.equal(made[1].view(torch.uint8), scales.view(torch.uint8)), name
    fewer = ops.quantize_nvfp4.op(x[:64], amax, seed, 5)
    assert torch.equal(fewer[0], values[:64])


def test_philox_gives_the_known_words():
    """The known-answer tests of Random123 (kat_vectors, philox4x32 10)."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = 0x299F31D0 << 32 | 0xA4093822
    ones = 0xFFFFFFFF

    def known(key, counter):
        counter = [torch.tensor([c]) for c in counter]
        return [int(w) for w in philox.philox(torch.tensor([key]), counter)]

    assert known(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert known(-1, (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert known(key, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_the_word_of_an_element_is_that_of_its_index():
    seed = torch.tensor([0x0123456789ABCDEF])
    made = philox.words(seed, 9, (3, 5))
    for index in range(15):
        counter = [torch.tensor([c]) for c in (index, 0, 9, 0)]
        assert int(made[index // 5, index % 5]) == int(philox.philox(seed, counter)[0])


@on_devices
def test_quantize_follows_the_seed_and_else_the_generator_of_torch(device):
    x = torch.randn(64, 64, device=device).to(torch.bfloat16)
    operand = Operand("nvfp4", (1, 16), rounding="stochastic")
    torch.manual_seed(5)
    first, second = quantize(x, operand).values, quantize(x, operand).values
    torch.manual_seed(5)
    assert torch.equal(quantize(x, operand).values, first)
    assert not torch.equal(first, second)
    assert torch.equal(quantize(x, operand, seed=7).values, quantize(x, operand, seed=7).values)
    assert not torch.equal(quantize(x, operand, seed=7).values, quantize(x, operand, seed=8).values)


def test_a_gemm_follows_its_seed_and_its_draw():
    dy, w = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    how = Gemm(Operand("nvfp4", (1, 16), rounding="stochastic"), Operand("nvfp4", (16, 16)))
    seed = torch.tensor([11])
    made = [gemm.mm(dy, w, how, seed=seed, draw=draw) for draw in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_gradients_average_to_the_unrounded_one_and_are_reproducible():
    x, w = torch.randn(32, 64).bfloat16().requires_grad_(), torch.randn(48, 64).bfloat16()
    dy = torch.randn(32, 48).bfloat16()

    def gradient():
        return torch.autograd.grad(linear(x, w, recipe="nvfp4"), x, dy)[0].float()

    torch.manual_seed(1)
    first = gradient()
    torch.manual_seed(1)
    assert torch.equal(gradient(), first)
    runs = torch.stack([gradient() for _ in range(256)])
    rounded = dequantize(quantize(w.t().contiguous(), Operand("nvfp4", (16, 16))))[:, :48]
    unrounded = dy.float() @ rounded.t()
    one, mean = ((r - unrounded).norm() / unrounded.norm() for r in (runs[0], runs.mean(0)))
    assert one > 0.1
    # Not one / 16: a block whose scale was rounded down clips its largest value.
    assert mean < one / 8


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
@pytest.mark.parametrize("hadamard", [0, 16])
def test_cpu_and_gpu_make_the_same_bits(hadamard, block, rounding):
    operand = Operand("nvfp4", block, rounding=rounding, hadamard=hadamard)
    x = torch.randn(200, 328).bfloat16()
    for transpose in (False, True):
        seed = torch.tensor([13])
        cpu = gemm.quantize(x, operand, transpose=transpose, seed=seed, draw=2)
        gpu = gemm.quantize(x.cuda(), operand, transpose=transpose, seed=seed.cuda(), draw=2)
        for made, expected in zip(gpu, cpu, strict=True):
            assert torch.equal(made.cpu().view(torch.uint8), expected.view(torch.uint8))
