"""A tensor and its maximum in one op: which pairs become one, and that no bit changes."""

import pytest
import torch
from oracle import FFN, bf16, cut, data

from lpcompile import ops
from lpcompile.graph import calls, placeholders

DIM, HIDDEN = 64, 128


def ffn(recipe, without=()):
    """The forward and the backward of an FFN, and what they made."""
    torch.manual_seed(0)
    return cut(bf16(FFN(DIM, HIDDEN)), data(48, DIM), without, recipe=recipe)


def test_a_weight_is_narrowed_and_its_maximum_taken_by_one_op():
    forward, backward, _ = ffn("fp8_tensorwise")
    weights = {n for n in placeholders(forward) if n.meta["val"].numel() == DIM * HIDDEN}
    assert {n.args[0] for n in calls(forward, {ops.quantize_fp8_whole.op})} == weights
    assert len(weights) == 3
    # In the backward under the maximum that was saved.
    assert calls(backward, {ops.quantize_fp8_whole.op, ops.amax_tensor.op}) == []
    assert len(calls(backward, {ops.quantize_fp8_tensor_t.op})) == 3


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "nvfp4"])
def test_an_amax_that_no_such_quantize_reads_stays(recipe):
    forward, backward, _ = ffn(recipe)
    assert calls(forward, {ops.quantize_fp8_whole.op}) == []
    assert calls(backward, {ops.quantize_fp8_whole.op}) == []


def test_one_op_changes_no_bit():
    *_, made = ffn("fp8_tensorwise")
    forward, _, expected = ffn("fp8_tensorwise", without=["fuse_whole"])
    assert len(calls(forward, {ops.amax_tensor.op})) == 3
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []
