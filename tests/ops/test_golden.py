"""Every quantizer against bytes that an independent implementation made (tests/golden)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpcompile import Operand, gemm, ops, quantize

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("cast_*.safetensors"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

on_devices = pytest.mark.parametrize("device", DEVICES)
on_files = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def load(path, device):
    return {k: v.to(device) for k, v in load_file(path).items()}


def same(made, expected):
    return torch.equal(made.view(torch.uint8), expected.view(torch.uint8))


@on_devices
@on_files
@pytest.mark.parametrize(
    ("operand", "names"),
    [
        (Operand("fp8", "row"), ("fp8_row_fp32_values", "fp8_row_fp32_scale")),
        (Operand("fp8_pow2", "row"), ("fp8_row_pow2_values", "fp8_row_pow2_scale")),
    ],
    ids=["fp8_row", "fp8_pow2_row"],
)
def test_fp8_rows_equal_the_golden_bytes(path, operand, names, device):
    golden = load(path, device)
    values, scales = (golden[name] for name in names)
    for x, transpose in ((golden["x"], False), (golden["x"].t().contiguous(), True)):
        made = gemm.quantize(x, operand, transpose=transpose)
        assert same(made.values, values)
        assert torch.equal(made.scales, 1 / scales.squeeze(1))


@on_devices
@on_files
@pytest.mark.parametrize(
    ("operand", "names"),
    [
        (Operand("mxfp8", (1, 32)), ("mxfp8_rceil_values", "mxfp8_rceil_scales")),
        (Operand("mxfp8_floor", (1, 32)), ("mxfp8_floor_values", "mxfp8_floor_scales")),
        (Operand("nvfp4", (1, 16)), ("nvfp4_1x16_codes", "nvfp4_1x16_scales")),
        (Operand("nvfp4", (16, 16)), ("nvfp4_16x16_codes", "nvfp4_16x16_scales")),
    ],
    ids=["mxfp8", "mxfp8_floor", "nvfp4", "nvfp4_square"],
)
def test_blocks_equal_the_golden_bytes(path, operand, names, device):
    golden = load(path, device)
    values, scales = (golden[name] for name in names)
    transposed = gemm.quantize(golden["x"].t().contiguous(), operand, transpose=True)
    for made in (quantize(golden["x"], operand), transposed):
        assert same(made.values, values)
        assert same(made.scales, scales)
        if operand.fmt.tensor_scale:
            assert torch.equal(made.tensor_amax, golden["amax"])


@on_devices
@on_files
def test_a_transformed_operand_equals_the_golden_bytes(path, device):
    golden = load(path, device)
    rht = golden["rht_t"]
    columns = golden["nvfp4_rht_t_codes"].shape[1]  # ours are padded to 16 bytes
    given = quantize(rht, Operand("nvfp4", (1, 16)), tensor_amax=golden["rht_t_amax"])
    made = [given]
    x = golden["x"]
    transform = ops.hadamard.op(x, ops.hadamard.SIGNS)
    if "tiny" in path.stem:
        pass  # there the golden transform flushed subnormals, and its quantizer did not
    elif "128x256_wide" in path.stem:
        # The golden transform summed in another order, which two elements show.
        assert int((transform != rht).sum()) == 2
    else:
        assert same(transform, rht)
        operand = Operand("nvfp4", (1, 16), hadamard=16)
        made += [gemm.quantize(x, operand, transpose=True), quantize(x.t(), operand)]
    for one in made:
        assert same(one.values[:, :columns].contiguous(), golden["nvfp4_rht_t_codes"])
        assert same(one.scales[:, : columns // 8].contiguous(), golden["nvfp4_rht_t_scales"])
        assert torch.equal(one.tensor_amax, golden["rht_t_amax"])
        assert not one.values[:, columns:].any()


@on_devices
@pytest.mark.parametrize("size", ["48x96", "128x256"])
def test_swizzled_scales_equal_the_golden_bytes(size, device):
    golden = load(GOLDEN / f"swizzle_{size}.safetensors", device)
    assert same(ops.swizzle.op(golden["scales"]), golden["swizzled"])
    as_e4m3 = ops.swizzle.op(golden["scales"].view(torch.float8_e4m3fn))
    assert same(as_e4m3, golden["swizzled"])


@on_devices
def test_swizzled_groups_equal_the_golden_bytes(device):
    golden = load(GOLDEN / "swizzle_128x256.safetensors", device)
    rows = ops.swizzle_grouped.op(golden["scales"], golden["m_groups_offs"])
    assert rows.shape == golden["m_groups_swizzled"].shape
    assert same(rows, golden["m_groups_swizzled"])
    columns = ops.swizzle_grouped_t.op(golden["scales"], golden["k_groups_offs"])
    assert columns.shape == golden["k_groups_swizzled"].shape
    assert same(columns, golden["k_groups_swizzled"])
    assert same(ops.swizzle_experts.op(golden["experts_scales"]), golden["experts_swizzled"])
