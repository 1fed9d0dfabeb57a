"""Fused quantizes of experts: what is merged, the bits of the chain, and rows in no group."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lpcompile import ops, pipeline
from lpcompile.ops.define import same_bits
from lpcompile.passes import fuse

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "fp8_rowwise_wgrad_bf16"]
E, DIM, HIDDEN, T, PAST = 5, 64, 128, 160, 9
COUNTS = (20, 0, 37, 1, 102)


class Apart(nn.Module):
    """SwiGLU experts of three weights, as torchtitan has them."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, HIDDEN, DIM) / 8) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, DIM, HIDDEN) / 6)

    def forward(self, x, scores, offs):
        gate, up = (torch._grouped_mm(x, w.mT, offs=offs) for w in (self.w1, self.w3))
        return torch._grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offs) * scores


class Together(nn.Module):
    """The same with gate and up in one weight, as Hugging Face has them."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(E, 2 * HIDDEN, DIM) / 8)
        self.down = nn.Parameter(torch.randn(E, DIM, HIDDEN) / 6)

    def forward(self, x, scores, offs):
        gate, up = torch._grouped_mm(x, self.gate_up.mT, offs=offs).chunk(2, -1)
        return torch._grouped_mm(F.silu(gate) * up, self.down.mT, offs=offs) * scores


def problem(experts, device, counts=COUNTS, past=0):
    """Experts, tokens, a score for each, and ends of groups; NaN in rows of no group."""
    torch.manual_seed(0)
    rows = sum(counts) + past
    model = experts().to(device).bfloat16()
    x = torch.randn(rows, DIM, device=device).bfloat16()
    scores = torch.rand(rows, 1, device=device).bfloat16()
    x[sum(counts) :], scores[sum(counts) :] = torch.nan, torch.nan
    return model, x, scores, torch.tensor(counts, device=device).cumsum(0).int()


def compiled(model, recipe, **options):
    torch._dynamo.reset()
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager", **options}
    return torch.compile(model, backend="lowprec", options=options, fullgraph=True)


def step(run, model, x, scores, offs):
    """Output and gradients, of the rows in groups alone."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x, scores, offs)
    torch.manual_seed(1)
    dy = torch.randn(T + 64, DIM, device=x.device).bfloat16()[: len(y)]
    real = int(offs[-1])
    y.backward(dy.index_fill(0, torch.arange(real, len(y), device=x.device), torch.inf))
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"y": y[:real].detach(), "x": x.grad[:real], **grads}


def traced(monkeypatch, passes):
    """Has the passes run after the cut, and collects the calls of what they leave."""
    calls = []

    def watch(graph):
        graph.eliminate_dead_code()
        calls.extend(n.target for n in graph.nodes if n.op == "call_function")
        return 0

    monkeypatch.setattr(pipeline, "AFTER_THE_CUT", [*passes, ("watch", watch)])
    return calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("experts", [Apart, Together])
def test_fused_gradients_of_experts_are_those_of_the_chain(experts, recipe, device, monkeypatch):
    model, *args = problem(experts, device, past=PAST)
    calls = traced(monkeypatch, [("fuse", fuse.run)])
    made = step(compiled(model, recipe), model, *args)
    assert calls.count(ops.fused_cast.op) >= (2 if "wgrad_bf16" not in recipe else 0)
    plain = traced(monkeypatch, [])
    chain = step(compiled(model, recipe), model, *args)
    assert not {ops.fused_cast.op, ops.fused_amax.op, ops.fused_quantize_row.op} & set(plain)
    for name, m in made.items():
        assert m.isfinite().all(), name
        if device == "cpu":
            assert same_bits(m, chain[name]) == "", name
        else:  # exp and division may differ in their last place, and move a code
            assert (m - chain[name]).norm() < 0.01 * chain[name].norm(), name


@pytest.mark.parametrize("recipe", FP8[:3])
@pytest.mark.parametrize("experts", [Apart, Together])
def test_no_gradient_between_experts_is_written_in_bf16(experts, recipe, monkeypatch):
    model, *args = problem(experts, "cpu")
    calls = traced(monkeypatch, [("fuse", fuse.run)])
    step(compiled(model, recipe), model, *args)
    count = Counter(calls)
    grouped = count[ops.quantize_fp8_grouped_t.op] + count[ops.quantize_fp8_block_grouped_t.op]
    assert grouped == 1  # of x
    assert torch.ops.aten.cat.default not in count
    assert count[torch.ops.aten.sigmoid.default] == 0
    if recipe != "fp8_blockwise":
        assert count[ops.fused_amax.op] >= 2  # of dY, and of both gradients and h


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", FP8[:3])
def test_rows_past_the_last_group_reach_nothing(recipe, device):
    model, x, scores, offs = problem(Together, device, past=64)
    made = step(compiled(model, recipe), model, x, scores, offs)
    real = int(offs[-1])
    expected = step(compiled(model, recipe), model, x[:real], scores[:real], offs)
    assert all(same_bits(made[name], expected[name]) == "" for name in made)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(0, 80, 0, 80, 0), (0, 0, 0, 0, 0), (160, 0, 0, 0, 0)])
def test_empty_groups_have_no_gradient(counts, device):
    model, *args = problem(Together, device, counts, past=16)
    made = step(compiled(model, "fp8_rowwise"), model, *args)
    for e, n in enumerate(counts):
        assert bool(made["gate_up"][e].any()) == bool(made["down"][e].any()) == (n > 0)


def fused(f, *args):
    """How many quantizes of f are merged, the calls that are left; its results do not change."""
    gm = make_fx(f, tracing_mode="fake")(*args)
    before, count = gm(*args), fuse.run(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert same_bits(gm(*args), before) == ""
    return count, Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


def by_groups(x, offs):
    amax = ops.amax_column_grouped.op(x, offs)
    return ops.quantize_fp8_grouped_t.op(x, amax, offs, torch.float8_e4m3fn, True)


def test_a_tensor_in_two_groupings_is_fused_in_one():
    def both(x, offs, ends):
        row = ops.quantize_fp8_row.op(x, torch.float8_e4m3fn, True)
        return *row, *by_groups(x, offs), *by_groups(x, ends)

    ends = [torch.tensor(counts).cumsum(0).int() for counts in (COUNTS, COUNTS[::-1])]
    count, calls = fused(both, torch.randn(T, DIM).bfloat16(), *ends)
    assert count == 2
    assert calls[ops.quantize_fp8_grouped_t.op] == 1


@pytest.mark.parametrize(("columns", "count"), [((48, 48), 0), ((48, 40), 1), ((40, 40), 1)])
def test_what_lies_side_by_side_is_read_apart_where_it_is_as_wide(columns, count):
    """The parts of a cat are, in whole vectors; else the cat is made and read."""

    def f(a, b, offs):
        x = torch.cat([a.relu(), b.relu()], 1)
        return *ops.quantize_fp8_row.op(x, torch.float8_e4m3fn, True), *by_groups(x, offs)

    offs = torch.tensor(COUNTS).cumsum(0).int()
    a, b = (torch.randn(T, n).bfloat16() for n in columns)
    made, calls = fused(f, a, b, offs)
    assert made == 2
    assert calls[torch.ops.aten.cat.default] == count


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", FP8)
def test_a_captured_step_of_fused_experts_follows_new_groups(recipe):
    model, x, scores, offs = problem(Together, "cuda")
    run = compiled(model, recipe)
    dy = torch.randn_like(x)
    x.requires_grad_()

    def both():
        return torch.autograd.grad(run(x, scores, offs), [x, *model.parameters()], dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = both()
    for counts in (COUNTS, (0, 0, T, 0, 0), (50, 50, 50, 5, 5), (1, 2, 3, 4, 5)):
        offs.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        expected = both()
        assert same_bits(made[0][: sum(counts)], expected[0][: sum(counts)]) == ""
        assert same_bits(made[1:], expected[1:]) == ""
