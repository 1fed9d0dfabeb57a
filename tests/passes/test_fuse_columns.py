"""Maxima that the backward narrows under are the forward's, and what it makes has the same bits."""

from collections import Counter

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EAGER, FFN, after_every_pass, bf16, data
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpcompile import Rule, ops, placement
from lpcompile.graph import calls, is_own
from lpcompile.ops.define import same_bits

DIM, HIDDEN, E = 64, 128, 4
OFFS = [20, 20, 57, 160]
AMAXES = {ops.amax_column.op, ops.amax_column_grouped.op, ops.amax_tensor.op}


class Experts(nn.Module):
    """SwiGLU experts."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, HIDDEN, DIM) / 8) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, DIM, HIDDEN) / 8)

    def forward(self, x):
        offs = torch.tensor(OFFS, device=x.device, dtype=torch.int32)
        gate, up = (torch._grouped_mm(x, w.mT, offs=offs) for w in (self.w1, self.w3))
        return torch._grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offs)


class Activated(nn.Module):
    """Two linears with an activation between them; ``wrap`` runs them."""

    def __init__(self, activation, wrap=lambda f, x: f(x)):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, HIDDEN, False), nn.Linear(HIDDEN, DIM, False)
        self.activation, self.wrap = activation, wrap

    def forward(self, x):
        return self.wrap(lambda x: self.second(self.activation(self.first(x))), x)


def cut(monkeypatch, model, x, kept=True, **options):
    """The forward and the backward as they run, and what they make."""
    with monkeypatch.context() as patch:
        if not kept:
            patch.setattr(placement, "_take_in_forward", lambda amax: None)
        return oracle.cut(model, x, **options)


def count(graph):
    return Counter(n.target for n in graph.nodes if is_own(n))


def with_maxima(graph):
    """What is narrowed by rows with the maxima of its columns taken in that read."""
    fused = (n for n in graph.nodes if n.target is ops.fused_quantize_row.op)
    return [n.args[0][0] for n in fused if n.args[4:5] == (True,)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("make", "num"),
    [
        (FFN, 3),  # weights
        (Experts, 4),  # and tokens that are given
        (lambda: Activated(F.silu), 3),
    ],
)
def test_maxima_of_what_is_in_memory_are_taken_where_it_is_narrowed(monkeypatch, make, num, device):
    model, x = bf16(make(), device), data(OFFS[-1], DIM, device=device)
    forward, backward, made = cut(monkeypatch, model, x, recipe="fp8_rowwise")
    assert len(with_maxima(forward)) == num
    _, before, expected = cut(monkeypatch, model, x, kept=False, recipe="fp8_rowwise")
    taken = [sum(count(g)[op] for op in (*AMAXES, ops.fused_amax.op)) for g in (before, backward)]
    assert taken[0] - taken[1] == num
    assert [name for name in made if same_bits(made[name], expected[name])] == []


@pytest.mark.parametrize("activation", [F.silu, lambda x: F.gelu(x, approximate="tanh")])
def test_nothing_is_written_for_maxima_alone(monkeypatch, activation):
    """What is made as it is narrowed, by a program or by Inductor, has them from the backward."""
    model = nn.Sequential(nn.RMSNorm(DIM), Activated(activation))
    forward, *_ = cut(monkeypatch, bf16(model), data(48, DIM), recipe="fp8_rowwise")
    assert len(with_maxima(forward)) == 2  # both weights
    assert not AMAXES & set(count(forward))


def test_attentions_output_is_in_memory(monkeypatch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(DIM, 3 * DIM, False), nn.Linear(DIM, DIM, False)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, -1, 3, 4, DIM // 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    forward, *_ = cut(monkeypatch, bf16(Attention()), data(2, 32, DIM), recipe="fp8_rowwise")
    assert len(with_maxima(forward)) == 4


def test_maxima_of_rows_that_are_too_wide_are_the_backwards(monkeypatch):
    monkeypatch.setattr(placement, "WIDEST_WITH_MAXIMA", HIDDEN - 1)
    model = bf16(FFN(DIM, HIDDEN))
    forward, backward, _ = cut(monkeypatch, model, data(48, DIM), recipe="fp8_rowwise")
    assert len(with_maxima(forward)) == 2
    assert count(backward)[ops.amax_column.op] == 1  # of w2, whose rows are as wide as h


def test_one_of_two_readers_that_asks_for_maxima_does_not_have_x_narrowed_twice(monkeypatch):
    model, x = FFN(DIM, HIDDEN), data(48, DIM)
    model.norm = nn.Identity()
    model = bf16(model)
    rules = [Rule("w1", "fp8_rowwise_wgrad_bf16")]
    forward, _, made = cut(monkeypatch, model, x, recipe="fp8_rowwise", rules=rules)
    assert len(with_maxima(forward)) == 4
    counts = count(forward)
    assert counts[ops.fused_quantize_row.op] + counts[ops.quantize_fp8_row.op] == 5
    *_, expected = cut(monkeypatch, model, x, kept=False, recipe="fp8_rowwise", rules=rules)
    assert [name for name in made if same_bits(made[name], expected[name])] == []


def test_a_checkpointed_region_saves_the_maxima_of_weights_alone(monkeypatch):
    """X is narrowed again in its backward, with what is made of it there."""

    def wrap(f, x):
        return checkpoint(f, x, use_reentrant=False)

    model, x = bf16(Activated(F.silu, wrap)), data(48, DIM)
    forward, _, made = cut(monkeypatch, model, x, recipe="fp8_rowwise")
    weights = [n for n in with_maxima(forward) if n.meta["val"].shape in {(128, 64), (64, 128)}]
    assert len(with_maxima(forward)) == len(weights) == 2
    *_, expected = cut(monkeypatch, model, x, kept=False, recipe="fp8_rowwise")
    assert [name for name in made if same_bits(made[name], expected[name])] == []


TAKING = {ops.amax_tensor.op, ops.quantize_fp8_whole.op}


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "nvfp4"])
def test_the_amax_of_experts_weights_is_taken_once(monkeypatch, recipe):
    forward, backward, _ = cut(monkeypatch, bf16(Experts()), data(160, DIM), recipe=recipe)
    weights = {(E, HIDDEN, DIM), (E, DIM, HIDDEN)}
    taken = [
        [n for n in calls(g, TAKING) if shape(n.args[0]) in weights] for g in (forward, backward)
    ]
    assert [len(nodes) for nodes in taken] == [3, 0]


def shape(node):
    return tuple(node.meta["val"].shape)


def test_without_a_backward_no_maxima_are_taken():
    torch._dynamo.reset()
    with torch.no_grad(), after_every_pass() as seen:
        torch.compile(bf16(FFN()), backend="lowprec", options=EAGER)(data(48, DIM, grad=False))
    assert not any(with_maxima(graph) or AMAXES & set(count(graph)) for graph in seen)


class Routed(nn.Module):
    """A linear and experts of one x, where groups end as the x or the linear's result says."""

    def __init__(self, by_result):
        super().__init__()
        self.shared, self.by_result = nn.Linear(DIM, DIM, False), by_result
        self.w = nn.Parameter(torch.randn(E, HIDDEN, DIM) / 8)

    def forward(self, x):
        shared = self.shared(x)
        chosen = (shared if self.by_result else x)[:, :E].argmax(1)
        offs = F.one_hot(chosen, E).sum(0).cumsum(0).to(torch.int32)
        return torch.cat([torch._grouped_mm(x, self.w.mT, offs=offs), shared], 1)


@pytest.mark.parametrize("rules", [(), (Rule("shared", "fp8_rowwise_wgrad_bf16"),)])
@pytest.mark.parametrize("by_result", [False, True])
def test_maxima_of_groups_wait_for_where_these_end(monkeypatch, by_result, rules):
    model, x = bf16(Routed(by_result)), data(160, DIM)
    options = {"recipe": "fp8_rowwise", "rules": list(rules)}
    *_, made = cut(monkeypatch, model, x, **options)
    *_, expected = cut(monkeypatch, model, x, kept=False, **options)
    assert [name for name in made if same_bits(made[name], expected[name])] == []
