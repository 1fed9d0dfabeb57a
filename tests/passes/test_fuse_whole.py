"""A tensor and its maximum in one op: which pairs become one, and that no bit changes."""

import pytest
import torch
from oracle import FFN, bf16, compiled, data, step

from lpcompile import ops, pipeline
from lpcompile.graph import calls, placeholders

DIM, HIDDEN = 64, 128


def cut(monkeypatch, recipe, merged=True):
    """The forward and the backward of an FFN after every pass, and what they made."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    seen = []
    steps = [s for s in pipeline.AFTER_THE_CUT if merged or s[0] != "fuse_whole"]
    with monkeypatch.context() as patch:
        look = ("look", lambda graph: seen.append(graph) or 0)
        patch.setattr(pipeline, "AFTER_THE_CUT", [*steps, look])
        made = step(compiled(bf16(FFN(DIM, HIDDEN)), recipe=recipe), data(48, DIM))
    forward, backward = seen
    return forward, backward, made


def test_a_weight_is_narrowed_and_its_maximum_taken_by_one_op(monkeypatch):
    forward, backward, _ = cut(monkeypatch, "fp8_tensorwise")
    weights = {n for n in placeholders(forward) if n.meta["val"].numel() == DIM * HIDDEN}
    assert {n.args[0] for n in calls(forward, {ops.quantize_fp8_whole.op})} == weights
    assert len(weights) == 3
    # In the backward under the maximum that was saved.
    assert calls(backward, {ops.quantize_fp8_whole.op, ops.amax_tensor.op}) == []
    assert len(calls(backward, {ops.quantize_fp8_tensor_t.op})) == 3


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "nvfp4"])
def test_an_amax_that_no_such_quantize_reads_stays(monkeypatch, recipe):
    forward, backward, _ = cut(monkeypatch, recipe)
    assert calls(forward, {ops.quantize_fp8_whole.op}) == []
    assert calls(backward, {ops.quantize_fp8_whole.op}) == []


def test_one_op_changes_no_bit(monkeypatch):
    *_, made = cut(monkeypatch, "fp8_tensorwise")
    forward, _, expected = cut(monkeypatch, "fp8_tensorwise", merged=False)
    assert len(calls(forward, {ops.amax_tensor.op})) == 3
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []
