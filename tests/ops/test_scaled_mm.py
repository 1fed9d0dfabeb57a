"""Which kernel multiplies is chosen by shape; the product is the same."""

import pytest
import torch

from lpcompile.ops import amax_tensor, quantize_fp8_tensor, scaled_mm


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
