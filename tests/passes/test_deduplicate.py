"""Without a backward: equal quantizes are one, and what the caller gets stays apart."""

import pytest
import torch
import torch.nn.functional as F
from oracle import compiled, data
from torch import nn

import lpcompile
from lpcompile import Operand
from lpcompile.pipeline import observe


def test_linears_of_one_x_quantize_it_once_though_each_copies_it():
    def both(x, w1, w3):
        return F.silu(x.t().clone() @ w1.t()) * (x.t().clone() @ w3.t())

    x, *weights = (data(*size).detach() for size in [(64, 32), (48, 64), (48, 64)])
    with torch.no_grad(), observe() as compiles:
        made = compiled(both)(x, *map(nn.Parameter, weights))
    assert made.shape == (32, 48)
    assert compiles[0].counts["deduplicate"] == 5  # a transpose, a copy, a quantize of two parts


def test_copies_that_the_caller_gets_are_tensors_of_their_own():
    def copies(x, w):
        return F.linear(x, w), x.clone(), x.clone(), x.clone().view(-1), x.clone().view(-1)

    x, w = data(32, 64).detach(), nn.Parameter(data(48, 64).detach())
    with torch.no_grad():
        _, *made = compiled(copies)(x, w)
    for one in made:
        one.zero_()
        others = [other for other in made if other is not one]
        assert all(torch.equal(other.view(-1), x.view(-1)) for other in others)
        one.copy_(x.view(one.shape))


@pytest.mark.parametrize("block", ["row", "tensor", (1, 128)])
def test_equal_quantizes_that_the_caller_gets_are_tensors_of_their_own(block):
    def twice(x):
        return [lpcompile.quantize(x, Operand("fp8", block)).values for _ in range(2)]

    with torch.no_grad():
        first, second = compiled(twice)(data(128, 128).detach())
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    assert first.data_ptr() != second.data_ptr()
