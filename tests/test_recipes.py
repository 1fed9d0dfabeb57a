"""What no GEMM can compute cannot be built, and the error says what to write instead."""

from dataclasses import replace

import pytest
import torch

from lpcompile.errors import RecipeError
from lpcompile.formats import FORMATS
from lpcompile.recipes import RECIPES, Gemm, Operand, Recipe

ROW, TENSOR, E5M2 = Operand("fp8", "row"), Operand("fp8", "tensor"), Operand("fp8_e5m2", "tensor")
FP4, MX = Operand("nvfp4", (1, 16)), Operand("mxfp8", (1, 32))
TURNED = Operand("nvfp4", (1, 16), hadamard=16)
RANDOM = Operand("nvfp4", (1, 16), rounding="stochastic")
BY_ROW = Gemm(ROW, ROW)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Operand("fp9", "row"), "no number format 'fp9': did you mean 'fp8'"),
        (lambda: Operand(["fp8"], "row"), r"no number format \['fp8'\]: did you mean 'fp8'"),
        (lambda: replace(FORMATS["fp8"], scaling="fp33"), "scaling 'fp33': did you mean 'fp32'"),
        (lambda: replace(FORMATS["fp8"], max=240.0), r"has max=240.0, .*e4m3fn \(max=448.0\)"),
        (lambda: replace(FORMATS["fp8"], element=torch.int8), "has max=448.0, .*e4m3fn"),
        (lambda: replace(FORMATS["fp8"], tensor_scale=True), "tensor_scale=True, .*'fp32' exists"),
        (lambda: replace(FORMATS["mxfp8"], swizzled=False), "has swizzled=False, and .*'rceil'"),
        (lambda: Operand("fp8", (1, 64)), r"no quantizer for block \(1, 64\); it takes 'tensor'"),
        (lambda: Operand("fp8", "row", rounding="up"), "'nearest' or 'stochastic', got 'up'"),
        (lambda: Operand("fp8", "row", rounding="stochastic"), "use rounding='nearest'"),
        (lambda: Operand("nvfp4", (1, 16), hadamard=32), "use hadamard=0"),
        (lambda: Operand("mxfp8", (1, 32), hadamard=16), "use hadamard=0"),
        (lambda: Gemm(ROW, "fp8"), "rhs of a Gemm is an lpcompile.Operand, got 'fp8'"),
        (lambda: Gemm(ROW, ROW, fast_accum=1), "fast_accum is True or False, got 1"),
        (lambda: Gemm(ROW, TENSOR), "lhs has 'row', rhs has 'tensor'"),
        (lambda: Gemm(ROW, FP4), "no GEMM multiplies 'fp8' by 'nvfp4'"),
        (lambda: Gemm(FP4, MX), "no GEMM multiplies 'nvfp4' by 'mxfp8'"),
        (lambda: Gemm(TURNED, FP4), "lhs has 16, rhs has 0"),
        (lambda: Gemm(E5M2, E5M2), "make one operand 'fp8'"),
        (lambda: Gemm(Operand("fp8_e5m2", "row"), ROW), "exists with block='tensor' only"),
        (lambda: Recipe(ROW, None, None), "fprop of a Recipe is an lpcompile.Gemm"),
        (lambda: Recipe(None, None, "bf16"), "wgrad of a Recipe is an lpcompile.Gemm"),
        (lambda: Recipe(BY_ROW, None, None, "fp8_rowwise"), "grouped of a Recipe is an"),
        (lambda: Recipe(Gemm(TURNED, TURNED), None, None), "for wgrad, .*: fprop has it"),
        (lambda: Recipe(None, Gemm(TURNED, TURNED), None), "for wgrad, .*: dgrad has it"),
        (lambda: Recipe(Gemm(RANDOM, FP4), None, None), "fprop.lhs has it"),
        (lambda: Recipe(None, Gemm(FP4, RANDOM), None), "dgrad.rhs has it"),
        (
            lambda: Recipe(None, None, None, RECIPES["fp8_tensorwise"]),
            "cannot have a `grouped` of its own",
        ),
    ],
)
def test_what_cannot_be_computed_cannot_be_built(build, says):
    with pytest.raises(RecipeError, match=says):
        build()
