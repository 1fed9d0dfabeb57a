"""What Inductor generates calls launches past the dispatcher, and ops where somebody looks."""

import inspect

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lpcompile import ops
from lpcompile.lowerings import launch
from lpcompile.ops import pointwise
from lpcompile.ops.define import same_bits

E4M3 = torch.float8_e4m3fn


def narrowed(x):
    amax = ops.amax_tensor.op(x)
    values, scale = ops.quantize_fp8_tensor.op(x, amax, E4M3, True)
    return ops.scaled_mm.op(values, scale, values, scale, torch.bfloat16, False), values


def compiled(x):
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        return run_and_get_code(torch.compile(narrowed, fullgraph=True), x)


def test_the_generated_code_calls_launches(monkeypatch):
    called = []

    def spy(op):
        return lambda *args, **kwargs: called.append(op) or op(*args, **kwargs)

    for op in (ops.amax_tensor.op, ops.quantize_fp8_tensor.op, ops.scaled_mm.op):
        monkeypatch.setattr(op, "launched", spy(op))
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    expected, (code,) = compiled(x)
    assert not called
    assert "launched" not in code
    monkeypatch.setattr(launch, "PAST", {"cpu"})
    made, _ = compiled(x)
    assert called == [ops.amax_tensor.op, ops.quantize_fp8_tensor.op, ops.scaled_mm.op]
    assert same_bits(made, expected) == ""


def test_a_list_of_one_that_the_cpp_wrapper_crashes_on_is_an_error():
    def maxima(x):
        return ops.fused_amax.op([x], pointwise.IDENTITY, ["tensor0"])

    with (
        torch._inductor.config.patch(cpp_wrapper=True),
        pytest.raises(Exception, match="cudagraphs"),
    ):
        torch.compile(maxima)(torch.randn(32, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("module", ops.ALL, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_launch_has_the_names_of_the_schema(module):
    named = [argument.name for argument in module.op._schema.arguments]
    assert list(inspect.signature(module.launch).parameters) == named


@pytest.mark.gpu
def test_a_launch_gives_the_bits_of_the_op():
    x = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")
    made, (code,) = compiled(x)
    assert code.count(".launched(") == 3
    assert same_bits(made, narrowed(x)) == ""


def test_who_looks_at_ops_sees_them():
    _, values = narrowed(torch.randn(32, 64, dtype=torch.bfloat16))
    args = values, torch.ones(1), values, torch.ones(1), torch.bfloat16, False
    with FlopCounterMode(display=False) as counter:
        ops.scaled_mm.op.launched(*args)
    assert counter.get_total_flops() == 2 * 32 * 32 * 64
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ops.scaled_mm.op.launched(*args)
    assert "lpcompile::scaled_mm" in {event.name for event in seen.events()}
