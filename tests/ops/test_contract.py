"""What every op module keeps. A new op is covered by being listed in ``ops.ALL``."""

from functools import cache

import pytest
import torch

from lpcompile import ops
from lpcompile.ops.define import same_bits

NAMES = ("outputs", "reference", "kernel", "launch", "op", "samples", "agrees")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@cache
def samples(module, device):
    torch.manual_seed(0)
    return module.samples(device)


def short(module):
    return module.__name__.rpartition(".")[2]


CASES = [
    pytest.param(module, i, id=f"{short(module)}-{i}")
    for module in ops.ALL
    for i in range(len(samples(module, "cpu")))
]


def outputs_of(made):
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_an_op_module_has_the_seven_names(module):
    assert [name for name in NAMES if not hasattr(module, name)] == []


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "i"), CASES)
def test_the_kernel_agrees_with_the_reference(module, i):
    args = samples(module, "cuda")[i]
    expected = getattr(module, "exact", module.reference)(*args)
    assert module.agrees(module.op(*args), expected) == ""


@pytest.mark.parametrize(
    ("module", "i"), [case for case in CASES if hasattr(case.values[0], "exact")]
)
def test_the_reference_agrees_with_what_is_exact(module, i):
    args = samples(module, "cpu")[i]
    assert module.agrees(module.op(*args), module.exact(*args)) == ""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("module", "i"), CASES)
def test_what_is_made_is_what_was_promised(module, i, device):
    args = samples(module, device)[i]
    promised, made = outputs_of(module.outputs(*args)), outputs_of(module.op(*args))
    for p, m in zip(promised, made, strict=True):
        assert (p.shape, p.dtype) == (m.shape, m.dtype)
        assert p.stride() == m.stride() or not p.numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_an_op_is_well_formed(module, device):
    for args in samples(module, device)[:4]:
        narrow = any(isinstance(a, torch.Tensor) and a.element_size() == 1 for a in args)
        # test_schema multiplies its inputs, which FP8 cannot (torch 2.11 to 2.13).
        tests = ["test_schema"] * (not narrow) + ["test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(module.op, args, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_an_op_leaves_its_inputs_alone(module, device):
    for args in samples(module, device)[:4]:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        before = [a.clone() for a in tensors]
        module.op(*args)
        assert same_bits(tensors, before) == ""
