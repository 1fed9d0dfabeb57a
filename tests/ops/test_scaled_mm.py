"""Which kernel multiplies is chosen by shape; the product is the same."""

import pytest
import torch

from lpcompile.ops import (
    amax_tensor,
    quantize_fp8_block,
    quantize_fp8_row,
    quantize_fp8_tensor,
    scaled_mm,
)

E4M3 = torch.float8_e4m3fn


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [48, 37, 1])
def test_tensor_scales_spread_over_rows_give_the_same_product(monkeypatch, rows):
    def quantized(r, c):
        x = torch.rand(r, c, device="cuda", dtype=torch.bfloat16)  # no sum cancels
        amax = amax_tensor.op(x)
        return quantize_fp8_tensor.op(x, amax, torch.float8_e4m3fn, False)

    calls, whole = [], scaled_mm._scaled_mm

    def watched(a, a_scale, b, b_scale, *args):
        calls.append((a_scale.numel(), b_scale.numel()))
        return whole(a, a_scale, b, b_scale, *args)

    monkeypatch.setattr(scaled_mm, "_scaled_mm", watched)
    a, b = quantized(rows, 256), quantized(64, 256)
    args = (*a, *b, torch.bfloat16, True)
    for least in (1, 2**60):
        monkeypatch.setattr(scaled_mm, "ROWS_PAY", least)
        assert scaled_mm.agrees(scaled_mm.op(*args), scaled_mm.exact(*args)) == ""
    assert calls == [(rows, 64), (rows, 64) if rows == 1 else (1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [quantize_fp8_row, quantize_fp8_block])
def test_short_rows_and_blocks_in_both_operands_go_to_warpgroups(monkeypatch, quantizer):
    a, b = (
        quantizer.op(torch.rand(r, 512, device="cuda", dtype=torch.bfloat16), E4M3, True)
        for r in (8200, 4112)  # no multiples of a tile
    )
    args = (*a, *b, torch.bfloat16, False)
    monkeypatch.setattr(torch, "_scaled_mm", None)
    assert scaled_mm.agrees(scaled_mm.op(*args), scaled_mm.exact(*args)) == ""
