"""The order of a graph's quantizes: how much lives at once, and that nothing else changes."""

import pytest
import torch
from oracle import EAGER, FFN, bf16, cut, data, step
from torch import nn

import lpcompile.peak
from lpcompile import ops
from lpcompile.graph import base, calls, num_bytes, placeholders
from lpcompile.ops.define import PRODUCTS
from lpcompile.passes import schedule
from lpcompile.peak import Memory

RECIPES = ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise"]
DIM, HIDDEN = 64, 128


class Block(nn.Module):
    """Something with a residual sum that the backward of a norm makes again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(DIM, DIM, bias=False)
        self.ffn = FFN(DIM, HIDDEN)

    def forward(self, x):
        return self.ffn(x + self.first(x))


def peak(graph):
    return max(Memory(graph).lives(list(graph.nodes)))


def hidden_casts(graph, hidden=HIDDEN):
    """Of each cast of SwiGLU's tensors in order, the inputs and the number of copies."""
    return [
        ({base(i).name for i in n.args[0]}, len(n.args[3]))
        for n in graph.nodes
        if n.target is ops.fused_cast.op and hidden in n.args[0][0].meta["val"].shape
    ]


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_tensors_are_cast_one_by_one_where_their_copies_would_make_the_peak(recipe):
    """All five copies of SwiGLU's backward beside its inputs took more memory than bf16 does."""
    hidden = 8 * DIM
    model, x = bf16(FFN(DIM, hidden)), data(1024, DIM)
    _, backward, _ = cut(model, x, recipe=recipe)
    assert sorted(copies for _, copies in hidden_casts(backward, hidden)) == [1, 2, 2]
    _, unordered, _ = cut(model, x, ["schedule"], recipe=recipe)
    assert peak(backward) < peak(unordered)


def reads(graph):
    """Bytes of the tensors that casts and transposes read."""
    casts = calls(graph, {ops.fused_cast.op, ops.transpose_fp8.op})
    return sum(num_bytes(base(i)) for cast in casts for i in cast.all_input_nodes)


class Routed(nn.Module):
    """SwiGLU experts of ragged groups, and rows in none; wide: gate and up from one product."""

    def __init__(self, hidden, wide):
        super().__init__()
        sizes = [2 * hidden] if wide else [hidden, hidden]
        self.up = nn.ParameterList(torch.randn(4, size, DIM) / 8 for size in sizes)
        self.down = nn.Parameter(torch.randn(4, DIM, hidden) / 8)

    def forward(self, x):
        offs = torch.tensor([100, 100, 357, len(x) - 9], device=x.device, dtype=torch.int32)
        made = [torch._grouped_mm(x, w.mT, offs=offs) for w in self.up]
        gate, up = made if len(made) == 2 else made[0].chunk(2, -1)
        return torch._grouped_mm(nn.functional.silu(gate) * up, self.down.mT, offs=offs)


SWIGLU = {
    "FFN": lambda: FFN(DIM, 8 * DIM),
    "experts": lambda: Routed(8 * DIM, wide=False),
    "experts, gate and up in one": lambda: Routed(8 * DIM, wide=True),
}


@pytest.mark.parametrize("name", SWIGLU)
def test_under_one_scale_what_is_cast_along_rows_is_transposed_when_it_is_needed(monkeypatch, name):
    model, x = bf16(SWIGLU[name]()), data(1024, DIM)
    _, backward, made = cut(model, x, recipe="fp8_tensorwise")
    monkeypatch.setattr(schedule, "_split", lambda graph, cast: None)
    _, both, expected = cut(model, x, recipe="fp8_tensorwise")
    assert len(calls(backward, {ops.transpose_fp8.op})) > 0
    assert calls(both, {ops.transpose_fp8.op}) == []
    assert reads(backward) < reads(both)
    assert peak(backward) <= peak(both) * (1 + lpcompile.peak.SLACK)
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []


def test_what_is_too_much_to_search_is_cast_as_it_was(monkeypatch):
    model, x = bf16(FFN(DIM, 8 * DIM)), data(1024, DIM)
    monkeypatch.setattr(lpcompile.peak, "MOST_CALLS", 0)
    _, backward, _ = cut(model, x, recipe="fp8_tensorwise")
    assert calls(backward, {ops.transpose_fp8.op}) == []
    assert sorted(copies for _, copies in hidden_casts(backward, 8 * DIM)) == [1, 2, 2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_are_cast_at_once_where_the_weights_make_the_peak(monkeypatch, recipe):
    model, x = bf16(FFN(DIM, HIDDEN)), data(16, DIM)
    _, backward, _ = cut(model, x, recipe=recipe)
    assert [copies for _, copies in hidden_casts(backward)] == [5]
    monkeypatch.setattr(schedule, "_joins", lambda casts, turned: [])
    _, split, _ = cut(model, x, recipe=recipe)
    assert sorted(copies for _, copies in hidden_casts(split)) == [1, 2, 2]
    assert peak(backward) == peak(split)


def test_an_input_dies_with_the_tensor_that_is_cast_next():
    """h and the gradient of gate need up, the gradient of up does not."""
    hidden = 8 * DIM
    _, backward, _ = cut(bf16(FFN(DIM, hidden)), data(1024, DIM), recipe="fp8_rowwise")
    (h, one), (gate, two), (up, too) = hidden_casts(backward, hidden)
    assert (one, two, too) == (1, 2, 2)
    assert h < gate
    assert up < gate
    assert h & up  # gate alone


def weights(graph):
    return [p for p in placeholders(graph) if num_bytes(p) in (2 * DIM**2, 2 * DIM * HIDDEN)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_is_quantized_right_before_its_gemm(recipe):
    model, x = bf16(Block()), data(512, DIM)
    for graph in cut(model, x, recipe=recipe)[:2]:
        copies = [n for n in calls(graph, NARROW) if n.all_input_nodes[0] in weights(graph)]
        assert len(copies) == 4
        for copy in copies:
            after = copy
            while after.target not in PRODUCTS:
                after = after.next
            assert after in {user for pair in copy.users for user in pair.users}


def test_the_amax_of_a_weight_is_taken_once():
    """In the forward, which saves it: one number."""
    model, x = bf16(Block()), data(512, DIM)
    forward, backward, _ = cut(model, x, recipe="fp8_tensorwise")
    taken = [
        {n.args[0] for n in calls(graph, TAKING)} & set(weights(graph))
        for graph in (forward, backward)
    ]
    assert [len(nodes) for nodes in taken] == [4, 0]


TAKING = {ops.amax_tensor.op, ops.quantize_fp8_whole.op}
NARROW = {
    ops.fused_quantize_row.op,
    ops.quantize_fp8_row.op,
    ops.quantize_fp8_row_t.op,
    ops.quantize_fp8_tensor.op,
    ops.quantize_fp8_tensor_t.op,
    ops.quantize_fp8_whole.op,
    ops.quantize_fp8_square.op,
    ops.quantize_fp8_square_t.op,
}


def test_x_is_narrowed_for_wgrad_from_what_is_held_anyway():
    """Nobody else has the residual sum x + first(x) in memory."""
    _, backward, _ = cut(bf16(Block()), data(512, DIM), recipe="fp8_rowwise")
    casts = [n for n in backward.nodes if n.target is ops.fused_cast.op]
    of_norm = [n for n in casts if "rsqrt" in "".join(base(i).name for i in n.args[0])]
    (norm,) = of_norm
    assert {base(i).op for i in norm.args[0]} == {"placeholder"}


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("recipe", [*RECIPES, "mxfp8", "nvfp4"])
def test_order_changes_no_bit(recipe, rows):
    model, x = bf16(Block()), data(rows, DIM)
    *_, made = cut(model, x, recipe=recipe)
    *_, expected = cut(model, x, ["schedule"], recipe=recipe)
    assert made.keys() == expected.keys()
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []


class Stacked(nn.Module):
    """SwiGLU experts by bmm, on what a linear makes."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(DIM, DIM, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.randn(4, HIDDEN, DIM) / 8) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(4, DIM, HIDDEN) / 8)

    def forward(self, x):
        shared = self.shared(x)
        x = shared.view(4, -1, DIM)
        h = nn.functional.silu(x @ self.w1.mT) * (x @ self.w3.mT)
        return (h @ self.w2.mT).flatten(0, 1) + shared


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise", "mxfp8"])
def test_sizes_that_are_not_known_are_no_tensors(recipe):
    model, x = bf16(Stacked()), data(160, DIM)
    made = []
    for dynamic in (True, False):
        torch._dynamo.reset()
        options = {**EAGER, "recipe": recipe}
        run = torch.compile(model, backend="lowprec", options=options, dynamic=dynamic)
        made.append(step(run, x))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[1])
