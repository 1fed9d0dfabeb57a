"""Fused quantizes of one matrix: where two reads of what makes it are fewer bytes than a copy."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import compiled, data
from torch import nn

import lpcompile
from lpcompile.ops.define import per_column
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


@pytest.mark.parametrize(("ops", "fused"), [(40, 1), (60, 0)])
def test_what_is_too_much_for_a_program_is_written_and_then_read(ops, fused):
    def deep(x, w):
        for _ in range(ops):
            x = torch.sigmoid(x)
        return F.linear(x, w)

    x, w = (data(48, 64).detach() for _ in range(2))
    with torch.no_grad(), observe() as compiles:
        compiled(deep, recipe="fp8_tensorwise")(x, nn.Parameter(w))
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


@pytest.mark.parametrize(
    ("recipe", "name", "merged"), [("fp8_tensorwise", "fuse", 2), ("mxfp8", "fuse_micro", 4)]
)
def test_a_tensor_that_is_computed_from_another_s_product_is_not_made_with_it(recipe, name, merged):
    def gated(linear, x, w1, w2):
        h = torch.relu(x)
        return linear(h * linear(h, w1), w2)

    x, w1, w2 = (data(64, 64).detach() for _ in range(3))
    weights = nn.Parameter(w1), nn.Parameter(w2)
    with torch.no_grad(), observe() as compiles:
        made = compiled(partial(gated, F.linear), recipe=recipe)(x, *weights)
    assert compiles[0].counts[name] == merged
    expected = gated(partial(lpcompile.linear, recipe=recipe), x, w1, w2)
    assert per_column(0.006)(made, expected) == ""


@pytest.mark.parametrize(("inputs", "merged"), [(3, 2), (4, 0)])
def test_a_gradient_of_many_tensors_is_written_and_then_read_for_both_its_copies(inputs, merged):
    """In blocks of 32 each copy is a kernel that reads every input."""

    def scaled(x, w, *factors):
        return math.prod([F.linear(x, w), *factors])

    x, w, *factors = (data(64, 64).detach() for _ in range(1 + inputs))
    with observe() as compiles:
        y = compiled(scaled, recipe="mxfp8")(x.requires_grad_(), nn.Parameter(w), *factors)
    y.backward(torch.ones_like(y))
    others = 4  # x and w both ways, each with its tiles of scales
    assert compiles[0].counts["fuse_micro"] == others + merged


def test_a_sum_with_a_factor_is_no_sum_of_the_two():
    def shifted(linear, x, y, w):
        return linear(torch.add(x, y, alpha=2), w)

    x, y, w = (data(48, 64).detach() for _ in range(3))
    made = compiled(partial(shifted, F.linear), recipe="fp8_tensorwise")
    with torch.no_grad():
        y_made = made(x, y, nn.Parameter(w))
    expected = shifted(partial(lpcompile.linear, recipe="fp8_tensorwise"), x, y, w)
    assert per_column(0.006)(y_made, expected) == ""
