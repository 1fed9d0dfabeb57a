"""Multiply two bf16 operands under the scales of their tensors: a[M, K], b[N, K] -> [M, N].

What ``scaled_mm`` does of MXFP8 and NVFP4 operands where it has dequantized them (without a
tensor's amax, of MXFP8, a plain product). Either may lie in memory the other way round.

The decode scales of the tensors, amax / 2688, go to the fp32 accumulator: on a bf16 result they
would round twice, and folded into an operand they would not be exact. cuBLAS takes them from the
host only, so that on Hopper NVFP4 goes to ``wgmma``, which applies them as it stores; elsewhere one
kernel scales and rounds cuBLAS's fp32 result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp4, grouped_gemm
from lpcompile.ops.define import cdiv, define, per_column
from lpcompile.ops.launcher import cached


def outputs(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def exact(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    """The product in fp64, which every implementation must meet."""
    product = a.double() @ b.double().t()
    for amax in (a_amax, b_amax):
        if amax is not None:
            product = product * (amax.double() / fp4.TENSOR_MAX)
    return product


def reference(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    product = a.float().contiguous() @ b.float().contiguous().t()
    for amax in (a_amax, b_amax):
        if amax is not None:
            product *= fp4.tensor_decode(amax)
    return product.to(out_dtype)


@cached
@triton.jit
def kernel(wide_ptr, a_amax_ptr, b_amax_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """wide[n] fp32 times the decode scales of two tensors, rounded once more."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.div_rn(tl.load(a_amax_ptr), 2688.0)
    b = tl.div_rn(tl.load(b_amax_ptr), 2688.0)
    wide = tl.load(wide_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, (wide * a * b).to(out_ptr.dtype.element_ty), mask=at < n)


def fill(wide: Tensor, a_amax: Tensor, b_amax: Tensor, out: Tensor) -> Tensor:
    """Run the kernel into ``out``."""
    grid = (cdiv(wide.numel(), 4096),)
    kernel[grid](wide, a_amax, b_amax, out, wide.numel(), 4096, num_warps=8)
    return out


def launch(
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    if not (a.shape[0] and b.shape[0] and a.shape[1]):
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    if a_amax is None and b_amax is None:
        return a @ b.t() if out_dtype == a.dtype else torch.mm(a, b.t(), out_dtype=out_dtype)
    one = torch.full((1,), fp4.TENSOR_MAX, device=a.device)  # whose decode scale is 1
    a_amax, b_amax = (one if amax is None else amax for amax in (a_amax, b_amax))
    made = outputs(a, b, out_dtype)
    scales = fp4.tensor_decode(a_amax), fp4.tensor_decode(b_amax)
    if grouped_gemm.suits_warpgroups(a, scales[0], b, scales[1]):
        from lpcompile.ops import wgmma  # which not every Triton can import

        wgmma.fill(a, scales[0], b, scales[1], None, made, fast_accum=True)
        return made
    return fill(torch.mm(a, b.t(), out_dtype=torch.float32), a_amax, b_amax, made)


def _flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[0]


op = define(
    "wide_mm(Tensor a, Tensor b, ScalarType out_dtype, Tensor? a_amax=None, Tensor? b_amax=None)"
    " -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
    flops=_flops,
)
agrees = per_column(0.01)


def samples(device: str) -> list[tuple[Any, ...]]:
    """Products of operands that lie either way, with and without the scales of tensors."""

    def randn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    bf16, amax = torch.bfloat16, (torch.rand(2, 1, device=device) * 5000).unbind()
    x, w, x_t, w_t = randn(48, 256), randn(64, 256), randn(256, 48).t(), randn(256, 64).t()
    pairs = [(x, w), (x_t, w), (x, w_t), (x_t, w_t), (randn(37, 203), randn(21, 203))]
    pairs += [(x[:0], w), (x[:, :0], w[:, :0])]
    made = [(a, b, bf16, *scales) for a, b in pairs for scales in ((None, None), amax)]
    return [*made, (x, w_t, torch.float32, None, None), (x_t, w, torch.float32, *amax)]
