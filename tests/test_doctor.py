"""doctor finds an op that computes something else, and knows what runs in hardware."""

import io

import pytest
import torch
from rich.console import Console

from lpcompile import doctor, ops
from lpcompile.__main__ import main
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
        ((8, 9), {"fp8"}),
        ((9, 0), {"fp8"}),
        ((10, 0), {"fp8", "mxfp8", "nvfp4"}),
        ((12, 0), {"fp8"}),
    ],
)
def test_what_runs_in_hardware_follows_from_the_capability(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name, recipe in RECIPES.items():
        for product in PRODUCTS:
            gemm = recipe.gemm(product)
            if gemm is not None:
                answer = doctor.natively(gemm, torch.device("cuda"))
                assert (answer == "native") == (name.partition("_")[0] in native)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["doctor", "--device", "nonsense"], "runs on cpu and on cuda, got 'nonsense'"),
        (["doctor", "--device", "cuda:99"], "no device 'cuda:99' here: "),
        (["bench", "ffn", "--device", "cuda:99"], "no device 'cuda:99' here: "),
        (["bench", "ffn", "--options", "rewrite=all"], "options are a JSON object"),
        (["bench", "ffn", "--options", "[]"], "options are a JSON object"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_is_right(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
