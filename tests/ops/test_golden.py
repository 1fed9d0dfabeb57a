"""Every quantizer against bytes that an independent implementation made (tests/golden)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpcompile import gemm
from lpcompile.recipes import Operand

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("cast_*.safetensors"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("operand", "names"),
    [
        (Operand("fp8", "row"), ("fp8_row_fp32_values", "fp8_row_fp32_scale")),
        (Operand("fp8_pow2", "row"), ("fp8_row_pow2_values", "fp8_row_pow2_scale")),
    ],
    ids=["fp8_row", "fp8_pow2_row"],
)
def test_fp8_rows_equal_the_golden_bytes(path, operand, names, device):
    golden = {k: v.to(device) for k, v in load_file(path).items()}
    values, scales = (golden[name] for name in names)
    for x, transpose in ((golden["x"], False), (golden["x"].t().contiguous(), True)):
        made = gemm.quantize(x, operand, transpose=transpose)
        assert torch.equal(made.values.view(torch.uint8), values)
        assert torch.equal(made.scales, 1 / scales.squeeze(1))
