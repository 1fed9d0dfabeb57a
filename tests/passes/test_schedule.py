"""The order of a graph's quantizes: how much lives at once, and that nothing else changes."""

from collections import defaultdict

import pytest
import torch
from oracle import FFN, bf16, compiled, data, step
from torch import nn

from lpcompile import ops, pipeline
from lpcompile.graph import base, calls, placeholders
from lpcompile.ops.define import PRODUCTS

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


def graphs(monkeypatch, model, x, recipe, scheduled=True):
    """The forward and the backward after every pass, and what they made."""
    torch._dynamo.reset()
    seen = []
    steps = [s for s in pipeline.AFTER_THE_CUT if scheduled or s[0] != "schedule"]
    with monkeypatch.context() as patch:
        look = ("look", lambda graph: seen.append(graph) or 0)
        patch.setattr(pipeline, "AFTER_THE_CUT", [*steps, look])
        made = step(compiled(model, recipe=recipe), x)
    forward, backward = seen
    return forward, backward, made


def num_bytes(node):
    made = node.meta.get("val")
    return made.numel() * made.element_size() if isinstance(made, torch.Tensor) else 0


def lives(graph, counted=lambda node: True):
    """Bytes of what is counted, alive while each node runs; of views, what they are views of."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = defaultdict(int)
    for node in graph.nodes:
        for i in node.all_input_nodes:
            last[base(i)] = order[node]
    made = {n: num_bytes(n) for n in graph.nodes if base(n) is n and counted(n)}
    return [
        sum(size for n, size in made.items() if order[n] <= at <= last[n]) for at in order.values()
    ]


def is_copy(node):
    """A narrow copy of a gradient of gate or up, or of what they make."""
    made = node.meta.get("val")
    wide = isinstance(made, torch.Tensor) and made.dtype.itemsize == 1
    return wide and node.op != "placeholder" and HIDDEN in made.shape and DIM not in made.shape


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_two_tensors_copies_live_at_once(monkeypatch, recipe):
    """All five copies of SwiGLU's backward beside its inputs took more memory than bf16 does."""
    rows = 512
    model, x = bf16(FFN(DIM, HIDDEN)), data(rows, DIM)
    _, backward, _ = graphs(monkeypatch, model, x, recipe)
    copies = lives(backward, is_copy)
    assert max(copies) == 2 * rows * HIDDEN
    _, unordered, _ = graphs(monkeypatch, model, x, recipe, scheduled=False)
    assert max(lives(backward)) < max(lives(unordered))


def hidden_casts(graph):
    """Of each cast of SwiGLU's tensors in order, the inputs and the number of copies."""
    return [
        ({base(i).name for i in n.args[0]}, len(n.args[3]))
        for n in graph.nodes
        if n.target is ops.fused_cast.op and HIDDEN in n.args[0][0].meta["val"].shape
    ]


@pytest.mark.parametrize("rows", [16, 512])
def test_an_input_dies_with_the_tensor_that_is_cast_next(monkeypatch, rows):
    """h and the gradient of gate need up, the gradient of up does not."""
    _, backward, _ = graphs(monkeypatch, bf16(FFN(DIM, HIDDEN)), data(rows, DIM), "fp8_rowwise")
    (h, one), (gate, two), (up, too) = hidden_casts(backward)
    assert (one, two, too) == (1, 2, 2)
    assert h < gate
    assert up < gate
    assert h & up  # gate alone


def test_wgrads_of_few_rows_wait_until_all_is_cast(monkeypatch):
    """The gradient of a weight is larger then than the copies that it lets go of."""
    _, backward, _ = graphs(monkeypatch, bf16(FFN(DIM, HIDDEN)), data(16, DIM), "fp8_rowwise")
    at = {node: i for i, node in enumerate(backward.nodes)}
    casts = [n for n in at if n.target is ops.fused_cast.op]
    hidden = [n for n in casts if HIDDEN in n.args[0][0].meta["val"].shape]
    products = [n for n in at if n.target in PRODUCTS]
    wgrads = [n for n in products if set(n.meta["val"].shape) == {DIM, HIDDEN}]
    assert len(hidden) == len(wgrads) == 3
    assert max(at[n] for n in hidden) < min(at[n] for n in wgrads)


def weights(graph):
    return [p for p in placeholders(graph) if num_bytes(p) in (2 * DIM**2, 2 * DIM * HIDDEN)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_is_quantized_right_before_its_gemm(monkeypatch, recipe):
    model, x = bf16(Block()), data(512, DIM)
    for graph in graphs(monkeypatch, model, x, recipe)[:2]:
        copies = [n for n in calls(graph, NARROW) if n.all_input_nodes[0] in weights(graph)]
        assert len(copies) == 4
        for copy in copies:
            after = copy
            while after.target not in PRODUCTS:
                after = after.next
            assert after in {user for pair in copy.users for user in pair.users}


def test_the_amax_of_a_weight_is_taken_once(monkeypatch):
    """In the forward, which saves it: one number."""
    model, x = bf16(Block()), data(512, DIM)
    forward, backward, _ = graphs(monkeypatch, model, x, "fp8_tensorwise")
    taken = [
        {n.args[0] for n in graph.nodes if n.target is ops.amax_tensor.op} & set(weights(graph))
        for graph in (forward, backward)
    ]
    assert [len(nodes) for nodes in taken] == [4, 0]


NARROW = {
    ops.fused_quantize_row.op,
    ops.quantize_fp8_row.op,
    ops.quantize_fp8_row_t.op,
    ops.quantize_fp8_tensor.op,
    ops.quantize_fp8_tensor_t.op,
    ops.quantize_fp8_square.op,
    ops.quantize_fp8_square_t.op,
}


def test_x_is_narrowed_for_wgrad_when_the_first_gradient_is(monkeypatch):
    """From what is held anyway: nobody else has the residual sum x + first(x) in memory."""
    _, backward, _ = graphs(monkeypatch, bf16(Block()), data(512, DIM), "fp8_rowwise")
    casts = [n for n in backward.nodes if n.target is ops.fused_cast.op]
    of_norm = [n for n in casts if "rsqrt" in "".join(base(i).name for i in n.args[0])]
    (norm,) = of_norm
    assert {base(i).op for i in norm.args[0]} == {"placeholder"}
    before = [n for n in casts[: casts.index(norm)] if HIDDEN in n.args[0][0].meta["val"].shape]
    assert [len(n.args[3]) for n in before] == [1, 2]  # h, and the gradient of gate


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("recipe", [*RECIPES, "mxfp8", "nvfp4"])
def test_order_changes_no_bit(monkeypatch, recipe, rows):
    model, x = bf16(Block()), data(rows, DIM)
    *_, made = graphs(monkeypatch, model, x, recipe)
    *_, expected = graphs(monkeypatch, model, x, recipe, scheduled=False)
    assert made.keys() == expected.keys()
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []
