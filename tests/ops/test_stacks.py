"""Stacks of matrices, the weights of experts: each as it is alone, and drawn apart."""

import pytest
import torch

from lpcompile import ops
from lpcompile.ops.define import same_bits

E4M3 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STACKED = (
    ops.quantize_fp8_row,
    ops.quantize_fp8_row_t,
    ops.quantize_fp8_tensor,
    ops.quantize_fp8_tensor_t,
    ops.quantize_fp8_block,
    ops.quantize_fp8_block_t,
    ops.quantize_fp8_square,
    ops.quantize_fp8_square_t,
    ops.quantize_mxfp8,
    ops.quantize_mxfp8_t,
    ops.quantize_mxfp8_square,
    ops.quantize_mxfp8_square_t,
    ops.quantize_nvfp4,
    ops.quantize_nvfp4_t,
    ops.quantize_nvfp4_square,
    ops.quantize_nvfp4_square_t,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("module", STACKED, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_stack_of_weights_is_quantized_one_by_one(module, swapped, device):
    w = torch.randn(3, 136, 203, device=device, dtype=torch.bfloat16)
    w[1] *= 8
    w = w.mT if swapped else w
    amax = {
        ops.quantize_fp8_row_t: ops.amax_column.op,
        ops.quantize_fp8_tensor: ops.amax_tensor.op,
        ops.quantize_fp8_tensor_t: ops.amax_tensor.op,
    }.get(module)

    def quantize(x):
        if module in STACKED[12:]:
            return module.op(x, ops.amax_tensor.op(x), None, 0)
        return module.op(x, *([amax(x)] if amax else []), E4M3, True)

    values, scales = quantize(w)
    for e in range(3):
        expected = quantize(w[e])
        of_matrix = scales[e : e + 1] if scales.dim() == 1 else scales[e]
        assert same_bits((values[e], of_matrix), expected) == ""


@pytest.mark.parametrize("device", DEVICES)
def test_matrices_of_a_stack_are_rounded_by_draws_of_their_own(device):
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16).expand(3, -1, -1)
    amax, seed = ops.amax_tensor.op(x), torch.tensor([5], device=device)
    values, scales = ops.quantize_nvfp4.op(x, amax, seed, 1)
    assert same_bits(scales[1], scales[0]) == ""
    first, _ = ops.quantize_nvfp4.op(x[0], amax[:1], seed, 1)
    assert same_bits(values[0], first) == ""
    differ = (values[None] != values[:, None]).float().mean((2, 3))
    assert bool((differ + torch.eye(3, device=device) > 0.1).all())
