"""What is saved for the backward, recomputed in it, and drawn anew in it."""

import pytest
import torch
import torch.nn.functional as F
from oracle import EAGER, FFN, OracleLinears, assert_close, bf16, compiled, data, roles, step, times
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lpcompile
from lpcompile.pipeline import observe


def must_save_mm(ctx, op, *args, **kwargs):
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("policy", [None, must_save_mm], ids=["all", "selective"])
def test_a_checkpointed_block_keeps_its_policy(policy, recipe):
    model, x = bf16(FFN()), data(3, 16, 64)
    context = {}
    if policy:
        context["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

    def block(x):
        return checkpoint(model, x, use_reentrant=False, **context)

    fast = torch.compile(
        block, backend="lowprec", options={**EAGER, "recipe": recipe}, fullgraph=True
    )
    with observe(measures=True) as compiles:
        y = fast(x)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y))
    made = {"y": y.detach(), "x": x.grad, "w2.weight": model.w2.weight.grad}
    made["w1.weight"], x.grad = model.w1.weight.grad, None
    assert roles(compiles) == times(3)
    with OracleLinears(recipe):
        expected = step(model, x)
    assert_close(made, {k: expected[k] for k in made})
    # x alone is saved, or with it what the policy says: the outputs of the three products.
    rows = x.numel() * x.element_size()
    before, after = compiles[0].saved_bytes
    assert after == before
    assert (after == rows) == (policy is None)


def test_what_the_backward_holds_anyway_is_not_saved_narrowed_too():
    def swiglu(x, w1, w3, w2):
        return (F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()

    (m, dim, hidden), x = (64, 64, 96), data(64, 64)
    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (96, 64), (64, 96)]]
    with observe(measures=True) as compiles:
        compiled(swiglu)(x, *weights).sum().backward()
    before, after = compiles[0].saved_bytes
    assert before == 2 * m * (dim + 3 * hidden)  # x, gate, up and h = silu(gate) * up
    maxima = 4 * dim  # of the columns of x, which is narrowed in the backward
    assert after == 2 * m * (dim + 2 * hidden) + maxima  # h is made again there


def test_a_vector_that_the_backward_lacks_is_saved_and_not_what_is_made_of_it():
    def shifted(x, w1, w3, w2):
        rows = x.detach().amax(1, keepdim=True)
        return (F.silu(x @ w1.t()) * (x @ w3.t()) + rows) @ w2.t()

    (m, dim, hidden), x = (64, 64, 96), data(64, 64)
    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (96, 64), (64, 96)]]
    with observe(measures=True) as compiles:
        compiled(shifted)(x, *weights).sum().backward()
    assert compiles[0].saved_bytes.after == 2 * m * (dim + 2 * hidden + 1) + 4 * dim


def test_what_the_backward_does_not_hold_is_saved_narrow():
    def deep(x, w1, w2):
        return x @ w1.t() @ w2.t()

    (m, dim, hidden), x = (64, 64, 96), data(64, 64)
    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (64, 96)]]
    with observe(measures=True) as compiles:
        compiled(deep)(x, *weights).sum().backward()
    before, after = compiles[0].saved_bytes
    assert before == 2 * m * (dim + hidden)
    # h.T of one byte, a scale a column; of x the maxima of its columns.
    assert after == 2 * m * dim + 4 * dim + m * hidden + 4 * hidden


def test_a_memory_budget_saves_as_much_as_it_says():
    saved = {}
    for budget in (1.0, 0.8, 0.2):
        torch._dynamo.reset()
        model, x = bf16(FFN(64, 256)), data(64, 64)
        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            observe(measures=True) as compiles,
        ):
            made = step(compiled(model), x)
        with OracleLinears():
            expected = step(model, x)
        assert_close({k.removeprefix("_orig_mod."): v for k, v in made.items()}, expected)
        saved[budget] = compiles[0].saved_bytes.after
    # Were our ops not counted, any budget below 1 would recompute everything.
    assert 0 < saved[0.2] < saved[0.8] < saved[1.0]


def test_no_copy_of_a_weight_is_saved():
    model, x = FFN(), torch.randn(48, 64, requires_grad=True)
    fast = compiled(model)
    sizes = set()

    def pack(t):
        sizes.add((tuple(t.shape), t.dtype, t.data_ptr()))
        return t

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        fast(x).sum().backward()
    own = {p.data_ptr() for p in model.parameters()}
    matrices = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    copies = [s for s in sizes if tuple(sorted(s[0])) in matrices and s[2] not in own]
    assert sizes
    assert copies == []


def test_under_one_scale_the_amax_of_a_weight_is_taken_in_the_forward_alone(tmp_path):
    def deep(x, w1, w2):
        return x @ w1.t() @ w2.t()

    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (64, 96)]]
    with lpcompile.dump(tmp_path):
        compiled(deep, recipe="fp8_tensorwise")(data(64, 64), *weights).sum().backward()
    parts = [(tmp_path / "graph_0" / f"{part}.py").read_text() for part in ("forward", "backward")]
    taken = [part.count("= lpcompile.amax_tensor(") for part in parts]
    assert taken == [4, 2]  # of x, w1, h and w2; of their gradients


def test_every_backward_draws_a_seed_of_its_own():
    w, x = nn.Parameter(torch.randn(96, 64).bfloat16()), data(64, 64)
    with torch._functorch.config.patch(donated_buffer=False):
        y = compiled(F.linear, recipe="nvfp4")(x, w)
        dy = torch.randn(64, 96).bfloat16()
        first, second = (torch.autograd.grad(y, (x, w), dy, retain_graph=True) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("rows", [2048, 16384], ids=["few rows", "many rows"])
def test_a_step_takes_less_memory_than_bf16(recipe, rows):
    """Through Inductor, which has an order of its own for what a graph computes."""

    def peak(**how):
        torch._dynamo.reset()
        model, x = bf16(FFN(1024, 3584), "cuda"), data(rows, 1024, device="cuda")
        fast = torch.compile(model, fullgraph=True, **how)
        for _ in range(3):
            fast(x).backward(torch.ones_like(x))
        model.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fast(x).backward(torch.ones_like(x))
        return torch.cuda.max_memory_allocated() - before

    narrow = peak(backend="lowprec", options={"recipe": recipe, "rewrite": "all"})
    assert narrow < peak()
