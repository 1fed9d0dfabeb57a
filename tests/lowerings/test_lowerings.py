"""An op that has a lowering, compiled alone, equals its reference bit for bit on every sample."""

import pytest
import torch

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
        return [lowering.OP(*args) for args in given]

    made = torch.compile(every, fullgraph=True)(samples)
    for args, pair in zip(samples, made, strict=True):
        assert same_bits(pair, module.reference(*args)) == "", args[1:]
