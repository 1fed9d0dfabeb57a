"""Fused quantizes of one matrix: where two reads of what makes it are fewer bytes than a copy."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import compiled, data
from torch import nn

from lpcompile.pipeline import observe


@pytest.mark.parametrize(("inputs", "fused"), [(3, 1), (4, 0)])
def test_what_many_tensors_make_is_written_and_then_read(inputs, fused):
    """3 reads twice are as many bytes as 3 reads, a write and two reads; 4 twice are more."""

    def product(w, *xs):
        return F.linear(math.prod(xs), w)

    w, *xs = (data(48, 64).detach() for _ in range(1 + inputs))
    with torch.no_grad(), observe() as compiles:
        compiled(product, recipe="fp8_tensorwise")(nn.Parameter(w), *xs)
    assert compiles[0].counts["fuse"] == fused


@pytest.mark.parametrize(("also", "fused"), [(False, 1), (True, 0)])
def test_what_somebody_else_reads_is_in_memory_and_made_once(also, fused):
    def of_relu(w, x):
        h = torch.relu(x)
        return (F.linear(h, w), h) if also else F.linear(h, w)

    w, x = (data(48, 64).detach() for _ in range(2))
    with torch.no_grad(), observe() as compiles:
        compiled(of_relu, recipe="fp8_tensorwise")(nn.Parameter(w), x)
    assert compiles[0].counts["fuse"] == fused
