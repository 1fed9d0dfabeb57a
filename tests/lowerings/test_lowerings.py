"""An op that has a lowering, compiled alone, equals its reference bit for bit on every sample."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from lpcompile import lowerings, ops
from lpcompile.ops.define import same_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODULES = {module.op: module for module in ops.ALL}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lowering", lowerings.ALL, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_lowering_gives_the_bits_of_the_reference(lowering, device):
    module = MODULES[lowering.OP]
    samples = [args for args in module.samples(device) if args[0].numel()]

    def every(given):
        # Times one: what is in memory already is left to the op.
        return [lowering.OP(x * 1, *args) for x, *args in given]

    made, (code,) = run_and_get_code(torch.compile(every, fullgraph=True), samples)
    assert code.count(f"{lowering.OP}(") < len(samples)
    for args, pair in zip(samples, made, strict=True):
        assert same_bits(pair, module.reference(*args)) == "", args[1:]
