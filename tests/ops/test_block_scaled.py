"""MXFP8 and NVFP4 beyond their golden bytes: rounding, NaN, padding, the GEMM and its arguments."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpcompile import RECIPES, Gemm, Operand, dequantize, gemm, linear, ops, quantize
from lpcompile.errors import ShapeError
from lpcompile.ops import block_scaled, fp4
from lpcompile.ops.block_scaled import Side
from lpcompile.ops.define import per_column

GOLDEN = Path(__file__).parents[1] / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
OPERANDS = {
    "mxfp8": Operand("mxfp8", (1, 32)),
    "mxfp8_square": Operand("mxfp8", (32, 32)),
    "mxfp8_floor": Operand("mxfp8_floor", (1, 32)),
    "nvfp4": Operand("nvfp4", (1, 16)),
    "nvfp4_square": Operand("nvfp4", (16, 16)),
}
on_operands = pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS)


def decoded(quantized):
    """An operand in fp64, element by element from the definitions of its formats."""
    values, scales, amax = quantized
    R = values.shape[0]
    rows = []
    for r in range(R):
        row = []
        for c, byte in enumerate(values[r].view(torch.uint8).tolist()):
            if amax is None:
                scale = 2.0 ** (int(scales[r, c // 32]) - 127)
                row.append(values[r, c].double().item() * scale)
                continue
            scale = float(scales[r, c // 8]) * float(amax) / 2688
            for code in (byte & 15, byte >> 4):
                row.append((-1) ** (code >> 3) * E2M1[code & 7] * scale)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_nearest_e2m1_is_the_nearest_with_ties_to_the_even_code():
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around = [edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)]
    v = torch.cat([*around, torch.tensor([*E2M1, 1e-45, 7.0, torch.inf]), torch.rand(500) * 6.5])
    for value, code in zip(v.tolist(), fp4.nearest(v).tolist(), strict=True):
        distance = [abs(min(value, 6.0) - g) for g in E2M1]
        nearest = [k for k in range(8) if distance[k] == min(distance)]
        assert code == (nearest[0] if len(nearest) == 1 else next(k for k in nearest if k % 2 == 0))
    negative = fp4.nearest(-v)
    assert torch.equal(negative, fp4.nearest(v) + 8)
    assert fp4.nearest(torch.tensor([torch.nan])).item() == 7


@on_devices
def test_rceil_is_the_smallest_scale_that_clips_nothing(device):
    amax = torch.cat([torch.arange(128, 256) * 2.0**e for e in (-40, -7, 0, 1, 60)])
    x = torch.zeros(len(amax), 32, device=device, dtype=torch.bfloat16)
    x[:, 7] = -amax
    _, scales = ops.quantize_mxfp8.op(x, torch.float8_e4m3fn, False)
    expected = [math.ceil(math.log2(a / 448)) + 127 for a in amax.tolist()]
    assert scales.flatten().tolist() == expected


@on_devices
@on_operands
def test_a_nan_reaches_its_block_and_nothing_else(operand, device):
    x = torch.randn(64, 96, device=device).to(torch.bfloat16)
    amax = {"tensor_amax": x.abs().amax().float()} if operand.fmt.tensor_scale else {}
    clean = dequantize(quantize(x, operand, **amax))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[33, 50] = bad
        made = dequantize(quantize(x, operand, **amax))
        rows, size = operand.block
        block = torch.zeros(64, 96, dtype=torch.bool, device=device)
        r, c = 33 // rows * rows, 50 // size * size
        block[r : r + rows, c : c + size] = True
        assert torch.equal(made.isnan(), block)
        assert torch.equal(made[~block], clean[~block])


@on_devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_tensor_whose_amax_is_not_finite_is_nan_throughout(bad, device):
    x = torch.randn(16, 32, device=device).to(torch.bfloat16)
    x[3, 4] = bad
    assert bool(dequantize(quantize(x, OPERANDS["nvfp4"])).isnan().all())


@on_devices
@on_operands
def test_padding_is_zero_and_changes_nothing(operand, device):
    x = torch.randn(37, 51, device=device).to(torch.bfloat16)
    whole = torch.nn.functional.pad(x, (0, 13))
    made, expected = quantize(x, operand), quantize(whole, operand)
    for a, b in zip(made, expected, strict=True):
        assert a is b or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    values = dequantize(made)
    assert values.shape == (37, 64)
    assert not bool(values[:, 51:].any())


@on_devices
@pytest.mark.parametrize("name", ["mxfp8_square", "nvfp4_square"])
def test_a_square_block_quantizes_the_transpose_alike(name, device):
    x = torch.randn(70, 100, device=device).to(torch.bfloat16)
    plain = dequantize(gemm.quantize(x, OPERANDS[name]))[:, :100]
    transposed = dequantize(gemm.quantize(x, OPERANDS[name], transpose=True))[:, :70]
    assert torch.equal(plain, transposed.t())


@on_operands
def test_dequantize_is_the_definition(operand):
    x = (torch.randn(33, 64) * 10.0 ** torch.randint(-3, 4, (33, 1))).bfloat16()
    made = quantize(x, operand)
    assert torch.allclose(dequantize(made).double(), decoded(made), rtol=3e-7, atol=0)


def test_hadamard_is_the_signed_sylvester_matrix_over_4():
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    s = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])
    x = torch.randn(48, 5).bfloat16()
    made = ops.hadamard.op(x, ops.hadamard.SIGNS).double()
    r = s.double().diag() @ h / 4
    expected = (x.double().t().reshape(5, 3, 16) @ r).reshape(5, 48)
    assert torch.allclose(made, expected, rtol=2**-8, atol=1e-6)
    one = torch.eye(16, dtype=torch.bfloat16)  # exact: every entry is 1/4
    assert torch.equal(ops.hadamard.op(one, ops.hadamard.SIGNS).double(), r.t().t())


def test_the_transform_of_both_operands_cancels():
    a, b = torch.randn(37, 20).bfloat16(), torch.randn(37, 30).bfloat16()
    ra, rb = (ops.hadamard.op(t, ops.hadamard.SIGNS).double() for t in (a, b))
    expected = a.double().t() @ b.double()
    assert ((ra @ rb.t() - expected).norm() / expected.norm()) < 0.004


SHAPES = {  # what each product of a linear multiplies, as lpcompile.linear gives it
    "fprop": ((40, 72), (24, 72), (False, False)),
    "dgrad": ((40, 24), (24, 72), (False, True)),
    "wgrad": ((40, 24), (40, 72), (True, True)),
}


@on_devices
@pytest.mark.parametrize("product", SHAPES)
@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp8_floor", "nvfp4"])
def test_a_product_is_that_of_its_operands_decoded_by_hand(recipe, product, device):
    a_shape, b_shape, transpose = SHAPES[product]
    how = RECIPES[recipe].gemm(product)
    a = torch.randn(a_shape, device=device).to(torch.bfloat16)
    b = torch.randn(b_shape, device=device).to(torch.bfloat16)
    seed = torch.tensor([5], device=device)
    made = gemm.mm(a, b, how, transpose=transpose, seed=seed, draw=1)
    x = gemm.quantize(a, how.lhs, transpose=transpose[0], seed=seed, draw=1)
    w = gemm.quantize(b, how.rhs, transpose=transpose[1])
    by_hand = (
        decoded([t if t is None else t.cpu() for t in x])
        @ decoded([t if t is None else t.cpu() for t in w]).t()
    )
    assert per_column(0.01)(made.cpu(), by_hand) == ""


@pytest.mark.parametrize(
    ("recipe", "floors"),
    [("mxfp8", (27, 25, 24)), ("mxfp8_floor", (27, 25, 24)), ("nvfp4", (16, 14, 13))],
)
def test_a_linear_is_within_the_noise_of_its_format(recipe, floors):
    x, w = torch.randn(256, 512).bfloat16(), torch.randn(128, 512).bfloat16()
    dy = torch.randn(256, 128).bfloat16()
    x.requires_grad_(), w.requires_grad_()
    y = linear(x, w, recipe=recipe)
    made = (y, *torch.autograd.grad(y, (x, w), dy))
    with torch.no_grad():
        expected = (x @ w.t(), dy @ w, dy.t() @ x)
    for one, reference, floor in zip(made, expected, floors, strict=True):
        error = (one.detach().double() - reference.double()).norm()
        assert 20 * math.log10(reference.double().norm() / error) > floor


def test_a_product_of_huge_and_tiny_tensors_keeps_its_scale():
    x, w = torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    how = RECIPES["nvfp4"].fprop
    base = gemm.mm(x, w, how).double()
    made = gemm.mm(x * 2.0**-100, w * 2.0**90, how).double()
    assert torch.allclose(made, base * 2.0**-10, rtol=2**-7)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("N", [128, 21])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_arguments_of_the_native_gemm_are_what_blackwell_reads(name, N, swizzled):
    a, b = (quantize(torch.randn(n, 256).bfloat16(), OPERANDS[name]) for n in (48, N))
    plain = (a.scales, b.scales)
    if swizzled:
        a, b = (q._replace(scales=ops.swizzle.op(q.scales)) for q in (a, b))
    made = block_scaled.arguments(Side(*a), Side(*b), torch.bfloat16)
    fp4_x2, e8m0 = torch.float4_e2m1fn_x2, torch.float8_e8m0fnu
    is_fp4 = name == "nvfp4"
    K = 128 if is_fp4 else 256  # in elements of the dtype
    padded = (N + 15) // 16 * 16
    assert made["self"].dtype == made["mat2"].dtype == (fp4_x2 if is_fp4 else torch.float8_e4m3fn)
    assert (made["self"].shape, made["self"].stride()) == ((48, K), (K, 1))
    assert (made["mat2"].shape, made["mat2"].stride()) == ((K, padded), (1, K))
    assert torch.equal(made["self"].view(torch.uint8), a.values.view(torch.uint8))
    columns = made["mat2"].t().view(torch.uint8)
    assert torch.equal(columns[:N], b.values.view(torch.uint8))
    assert not bool(columns[N:].any())
    for side, rows, amax in (("a", plain[0], a.tensor_amax), ("b", plain[1], b.tensor_amax)):
        scales = made[f"scale_{side}"]
        assert scales[0].dtype == (torch.float8_e4m3fn if is_fp4 else e8m0)
        assert scales[0].is_contiguous()
        assert scales[0].numel() == 128 * (16 if is_fp4 else 8)
        expected = by_definition(rows.view(torch.uint8))
        assert torch.equal(scales[0].view(torch.uint8).flatten(), expected)
        if is_fp4:
            assert (scales[1].dtype, scales[1].shape) == (torch.float32, (1,))
            assert scales[1].item() == (amax / torch.tensor([2688.0])).item()
        # ScalingType: 0 the tensor, 2 1x16, 3 1x32. SwizzleType: 0 none, 1 the 32_4_4 tiles.
        assert made[f"recipe_{side}"] == ([2, 0] if is_fp4 else [3])
        assert made[f"swizzle_{side}"] == ([1, 0] if is_fp4 else [1])
    assert made["bias"] is None
    assert made["out_dtype"] == torch.bfloat16


def by_definition(scales):
    """Swizzled scales, byte by byte as NUMERICS says."""
    R, C = scales.shape
    tiles = (C + 3) // 4
    out = torch.zeros((R + 127) // 128 * 128 * tiles * 4, dtype=torch.uint8)
    for r in range(R):
        for c in range(C):
            tile = r // 128 * tiles + c // 4
            out[tile * 512 + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return out


def test_arguments_hold_the_golden_swizzled_bytes():
    golden = load_file(GOLDEN / "swizzle_128x256.safetensors")
    values = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    side = Side(values, golden["scales"], None)
    made = block_scaled.arguments(side, side, torch.bfloat16)
    for scales in (made["scale_a"], made["scale_b"]):
        assert torch.equal(scales[0].view(torch.uint8), golden["swizzled"])


def test_arguments_are_named_as_torch_names_them():
    a = quantize(torch.randn(16, 32).bfloat16(), OPERANDS["mxfp8"])
    made = block_scaled.arguments(Side(*a), Side(*a), torch.bfloat16)
    schema = torch.ops.aten._scaled_mm_v2.default._schema
    assert list(made) == [argument.name for argument in schema.arguments][: len(made)]


def test_swizzling_in_the_graph_changes_no_product():
    x, w = torch.randn(40, 96).bfloat16(), torch.randn(24, 96).bfloat16()
    for name in ("mxfp8", "nvfp4"):
        how = Gemm(OPERANDS[name], OPERANDS[name])
        a, b = quantize(x, how.lhs), quantize(w, how.rhs)
        options = {"out_dtype": torch.bfloat16, "fast_accum": False}
        plain = gemm.multiply(a, b, **options)
        assert torch.equal(plain, gemm.multiply(a, b, swizzled=True, **options))


@pytest.mark.parametrize(
    ("x", "operand", "options", "said"),
    [
        (torch.zeros(4, 32), "mxfp8", {}, "cast it to torch.bfloat16"),
        (torch.zeros(2, 4, 32).bfloat16(), "mxfp8", {}, "reshape it to a matrix"),
        (torch.zeros(4, 32).bfloat16(), "mxfp8", {"tensor_amax": 1.0}, "'mxfp8' has none"),
        (torch.zeros(4, 32).bfloat16(), "nvfp4", {"seed": 1}, "rounding='stochastic'"),
    ],
)
def test_quantize_refuses_what_it_cannot_do(x, operand, options, said):
    with pytest.raises(ShapeError, match=said):
        quantize(x, OPERANDS[operand], **options)


@pytest.mark.gpu
@on_operands
def test_cpu_and_gpu_make_the_same_bits(operand):
    x = (torch.randn(200, 328) * 10.0 ** torch.randint(-30, 30, (200, 1))).bfloat16()
    for transpose in (False, True):
        cpu = gemm.quantize(x, operand, transpose=transpose)
        gpu = gemm.quantize(x.cuda(), operand, transpose=transpose)
        for made, expected in zip(gpu, cpu, strict=True):
            same = made is expected or torch.equal(
                made.cpu().view(torch.uint8), expected.view(torch.uint8)
            )
            assert same
