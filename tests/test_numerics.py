"""Every recipe and product against fp64 of operands that this file quantizes and decodes itself.

The compiled path and the oracle share ``gemm.py``; what both got wrong would show only here. FP8 is
spelled out below from its definition. MXFP8 and NVFP4 are decoded from ``lpcompile.quantize``, and
its bytes are held to an independent implementation's (tests/ops/test_golden.py).
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lpcompile
from lpcompile.recipes import PRODUCTS, RECIPES

# (M, N, K): the linears of a Llama3-8B block on a GPU, one that needs every kind of padding here.
LLAMA = [(2048, 4096, 4096), (2048, 1024, 4096), (2048, 14336, 4096), (2048, 4096, 14336)]
SHAPES = [
    pytest.param("cpu", (144, 80, 272), id="cpu"),
    *(pytest.param("cuda", s, id="x".join(map(str, s)), marks=pytest.mark.gpu) for s in LLAMA),
]
# Hopper's FP8 tensor cores keep some 14 bits of a sum, and drop the rest of what is added to it.
# With fast accumulation the sum of all K stays in them; else that of 128, and fp32 adds those up.
DROPPED = 2**-12


def to_nearest(gemm):
    return gemm and replace(gemm, lhs=replace(gemm.lhs, rounding="nearest"))


def decoded(x, operand):
    """x[R, C] as a GEMM sees it, scales along C, in fp64."""
    fmt = operand.fmt
    if fmt.scaling not in ("fp32", "pow2"):
        made = lpcompile.quantize(x.contiguous(), operand)
        return lpcompile.dequantize(made)[:, : x.shape[1]].double()
    R, C = x.shape
    rows, columns = {"tensor": (R, C), "row": (1, C)}.get(operand.block, operand.block)
    out = torch.empty(R, C, dtype=torch.float64, device=x.device)
    for r in range(0, R, rows) if rows > 1 else [slice(0, R)]:
        at = r if rows == 1 else slice(r, min(r + rows, R))
        for c in range(0, C, columns):
            block = x[at, c : c + columns].double()
            dims = (1,) if rows == 1 else (0, 1)
            amax = block.abs().amax(dims, keepdim=True).clamp(min=1e-12)
            scale = (torch.full_like(amax, fmt.max) / amax).float()
            if fmt.scaling == "pow2":
                scale = torch.exp2(torch.frexp(scale).exponent - 1.0)
            scaled = (block.float() * scale).clamp(-fmt.max, fmt.max)
            out[at, c : c + columns] = scaled.to(fmt.element).double() / scale.double()
    return out


def operands(product, gemm, x, w, dy):
    """a[R, T] and b[C, T] of a @ b.T in fp64; in bf16 where the recipe leaves it alone."""
    lhs, rhs = {"fprop": (x, w), "dgrad": (dy, w.t()), "wgrad": (dy.t(), x.t())}[product]
    if gemm is None:
        return lhs.double(), rhs.double()
    if gemm.lhs.hadamard:  # of both, along the contraction: it cancels
        a, b = (
            lpcompile.quantize(t.contiguous(), o) for t, o in ((lhs, gemm.lhs), (rhs, gemm.rhs))
        )
        return lpcompile.dequantize(a).double(), lpcompile.dequantize(b).double()
    return decoded(lhs, gemm.lhs), decoded(rhs, gemm.rhs)


def assert_accurate(made, a, b, fast, product):
    """Every column within 1% of its norm, and of what a fast accumulator may drop of magnitudes."""
    exact = a @ b.t()
    error, bound = (made.double() - exact).norm(dim=0), 0.01 * exact.norm(dim=0)
    if fast and made.is_cuda:
        bound += DROPPED * (a.abs() @ b.abs().t()).norm(dim=0)
    assert (error <= bound).all(), (product, int((error > bound).sum()), (error / bound).max())


@pytest.mark.parametrize(("device", "shape"), SHAPES)
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.is_bf16])
def test_every_product_is_that_of_independently_decoded_operands(name, device, shape):
    M, N, K = shape
    recipe = replace(
        RECIPES[name],
        dgrad=to_nearest(RECIPES[name].dgrad),
        wgrad=to_nearest(RECIPES[name].wgrad),
    )
    x = torch.randn(M, K, device=device).bfloat16().requires_grad_()
    w = torch.nn.Parameter((torch.randn(N, K, device=device) / 64).bfloat16())
    dy = torch.randn(M, N, device=device).bfloat16()
    with torch.no_grad():
        x[3] *= 100  # an outlier row, column and element
        x[:, 5] *= 30
        w[7, 9] = 4.0
    linear = torch.compile(
        F.linear,
        backend="lowprec",
        options={"recipe": recipe, "rewrite": "all", "codegen": "eager"},
        fullgraph=True,
    )
    y = linear(x, w)
    y.backward(dy)
    for product, made in zip(PRODUCTS, (y, x.grad, w.grad), strict=True):
        gemm = recipe.gemm(product)
        a, b = operands(product, gemm, x.detach(), w.detach(), dy)
        assert_accurate(made.detach(), a, b, gemm is not None and gemm.fast_accum, product)


def test_what_quantize_gives_back_is_no_part_of_a_backward():
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    made = lpcompile.quantize(x, lpcompile.Operand("fp8", "row"))
    assert not lpcompile.dequantize(made).requires_grad
