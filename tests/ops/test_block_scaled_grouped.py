"""The arguments of Blackwell's grouped GEMM, field by field, for every shape of product."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpcompile import gemm, gemm_grouped
from lpcompile.ops import block_scaled_grouped, groups
from lpcompile.ops.block_scaled import Side
from lpcompile.recipes import RECIPES

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = (20, 0, 200, 1, 35)
E, T, K = len(COUNTS), sum(COUNTS), 96
OFFS = torch.tensor(COUNTS).cumsum(0).int()
on_formats = pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
on_sizes = pytest.mark.parametrize("N", [48, 21])


def bf16(*shape):
    return torch.randn(*shape).bfloat16()


def tiled(scales):
    """The bytes of scales[R, C] in tiles, one by one as NUMERICS says."""
    R, C = scales.shape
    across = -(-C // 4)
    out = torch.zeros(-(-R // 128) * 128 * across * 4, dtype=torch.uint8)
    for r in range(R):
        for c in range(C):
            tile = r // 128 * across + c // 4
            at = tile * 512 + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4
            out[at] = scales.view(torch.uint8)[r, c]
    return out


def holds(scales, each):
    """That the bytes of scales begin with those of every group, tiled on its own, and end in 0."""
    flat = scales.view(torch.uint8).flatten()
    expected = torch.cat([tiled(one) for one in each])
    assert torch.equal(flat[: len(expected)], expected)
    assert not flat[len(expected) :].any()


def check_fields(made, a, b, name):
    """What holds for every product."""
    schema = torch.ops.aten._scaled_grouped_mm_v2.default._schema
    assert list(made) == [argument.name for argument in schema.arguments]
    is_fp4 = name == "nvfp4"
    dtype = torch.float4_e2m1fn_x2 if is_fp4 else torch.float8_e4m3fn
    assert made["self"].dtype == made["mat2"].dtype == dtype
    assert torch.equal(made["self"].view(torch.uint8), a.values.view(torch.uint8))
    rows = b.values.shape[-2]
    of_b = made["mat2"].mT.view(torch.uint8)
    assert made["mat2"].mT.is_contiguous()
    assert of_b.shape[-2] == -(-rows // 16) * 16
    assert torch.equal(of_b[..., :rows, :], b.values.view(torch.uint8))
    assert not of_b[..., rows:, :].any()
    for side, amax in (("a", a.tensor_amax), ("b", b.tensor_amax)):
        scales = made[f"scale_{side}"]
        assert scales[0].dtype == (torch.float8_e4m3fn if is_fp4 else torch.float8_e8m0fnu)
        assert scales[0].is_contiguous()
        if is_fp4:
            assert (scales[1].dtype, scales[1].shape) == (torch.float32, (E,))
            assert scales[1].is_contiguous()
            assert scales[1].tolist() == (amax / torch.full_like(amax, 2688)).expand(E).tolist()
        # ScalingType: 0 the tensor, 2 1x16, 3 1x32. SwizzleType: 0 none, 1 the 32_4_4 tiles.
        assert made[f"recipe_{side}"] == ([2, 0] if is_fp4 else [3])
        assert made[f"swizzle_{side}"] == ([1, 0] if is_fp4 else [1])
    rest = {k: made[k] for k in ("bias", "out_dtype", "contraction_dim", "use_fast_accum")}
    assert list(rest.values()) == [None, torch.bfloat16, [], False]


def accepted(made):
    """The shape that torch's own checks, of the MXFP8 part of the older call, let through."""
    on = {k: v.to("meta") for k, v in made.items() if k in ("self", "mat2", "offs")}
    scales = (made[f"scale_{side}"][0].to("meta") for side in "ab")
    args = (on["self"], on["mat2"], *scales, on["offs"])
    return torch._scaled_grouped_mm(*args, out_dtype=torch.bfloat16).shape


@on_sizes
@on_formats
def test_rows_by_group_and_experts_are_what_blackwell_reads(name, N):
    how = RECIPES[name].fprop
    a = gemm_grouped.quantize_tokens(bf16(T, K), how.lhs, OFFS)
    b = gemm.quantize(bf16(E, N, K), how.rhs)
    made = block_scaled_grouped.arguments(Side(*a), Side(*b), OFFS)
    check_fields(made, a, b, name)
    assert made["offs"] is OFFS
    holds(made["scale_a"][0], [a.scales[rows] for rows in groups.slices(OFFS)])
    holds(made["scale_b"][0], list(b.scales))
    padded, across = -(-N // 16) * 16, K // how.lhs.block[1]
    assert made["scale_b"][0].shape == (E, 128 * -(-across // 4) * 4)
    if name == "mxfp8":
        assert accepted(made) == (T, padded)


@on_sizes
@on_formats
def test_columns_by_group_are_what_blackwell_reads(name, N):
    how = RECIPES[name].wgrad
    a, padded = gemm_grouped.quantize_groups_t(bf16(T, N), how.lhs, OFFS)
    b, _ = gemm_grouped.quantize_groups_t(bf16(T, K), how.rhs, OFFS)
    made = block_scaled_grouped.arguments(Side(*a), Side(*b), padded)
    check_fields(made, a, b, name)
    assert made["offs"].tolist() == [128, 128, 384, 512, 640]  # in elements
    size = how.lhs.block[1]
    for side, quantized in (("a", a), ("b", b)):
        columns = [slice(s.start // size, s.stop // size) for s in groups.slices(padded)]
        holds(made[f"scale_{side}"][0], [quantized.scales[:, c] for c in columns])
    if name == "mxfp8":
        assert accepted(made) == (E, N, K)


def test_arguments_hold_the_golden_swizzled_bytes():
    golden = load_file(GOLDEN / "swizzle_128x256.safetensors")
    values = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    side = Side(values, golden["scales"], None)
    experts = Side(values.expand(3, -1, -1), golden["experts_scales"], None)
    made = block_scaled_grouped.arguments(side, experts, golden["m_groups_offs"][1:])
    assert torch.equal(made["scale_b"][0].view(torch.uint8), golden["experts_swizzled"])
    made = block_scaled_grouped.arguments(side, side, golden["k_groups_offs"] * 32)
    assert torch.equal(made["scale_a"][0].view(torch.uint8), golden["k_groups_swizzled"])
    four = Side(*(t[[0, 0, 0, 0]] for t in experts[:2]), None)
    made = block_scaled_grouped.arguments(side, four, golden["m_groups_offs"])
    assert torch.equal(made["scale_a"][0].view(torch.uint8), golden["m_groups_swizzled"])
