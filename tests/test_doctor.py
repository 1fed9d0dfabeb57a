"""doctor finds an op that computes something else, and knows what runs in hardware."""

import io

import pytest
import torch
from rich.console import Console

from lpcompile import doctor, ops
from lpcompile.cost import kind
from lpcompile.recipes import PRODUCTS, RECIPES

CPU = torch.device("cpu")


def examined(device):
    out = io.StringIO()
    return doctor.examine(device, Console(file=out, width=120)), out.getvalue()


def test_a_healthy_machine_passes():
    status, text = examined(CPU)
    assert status == 0
    assert f"torch: {torch.__version__}" in text
    assert "compute what they should" in text


def test_an_op_that_computes_something_else_is_named(monkeypatch):
    op = ops.quantize_fp8_row.op
    monkeypatch.setattr(ops.quantize_fp8_row, "op", lambda x, *args: op(x * 1.5, *args))
    status, text = examined(CPU)
    assert status == 1
    assert "WRONG quantize_fp8_row: output 0" in text
    assert "WRONG quantize_fp8_block" not in text


@pytest.mark.gpu
def test_the_device_s_kernels_compute_what_they_should():
    status, text = examined(torch.device("cuda"))
    assert status == 0, text


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((8, 0), set()),
        ((8, 9), {("fp8", "tensor"), ("fp8", "row")}),
        ((9, 0), {("fp8", s) for s in ("tensor", "row", "square", "block")}),
        ((10, 0), {("fp8", "tensor"), ("fp8", "row")}),
    ],
)
def test_what_runs_in_hardware_follows_from_the_capability(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for recipe in RECIPES.values():
        for product in PRODUCTS:
            gemm = recipe.gemm(product)
            if gemm is not None and gemm.lhs.fmt.scaling in ("fp32", "pow2"):
                answer = doctor.natively(gemm, torch.device("cuda"))
                assert (answer == "native") == (kind(gemm) in native)
