"""Quantizes above row gathers: which are hoisted, that no bit changes, and what is saved."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config
from torch.profiler import profile

import lpcompile
from lpcompile.ops.define import per_column, same_bits
from lpcompile.passes import hoist
from lpcompile.pipeline import observe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise"]
close = per_column(0.02)
E, K, N, T, TOP = 5, 64, 48, 40, 4
R = T * TOP

SPELLINGS = {
    "index": lambda x, rows: x[rows],
    "index_select": lambda x, rows: torch.index_select(x, 0, rows),
    "gather": lambda x, rows: torch.gather(x, 0, rows[:, None].expand(-1, K)),
    "rows as a matrix": lambda x, rows: x[rows.view(T, TOP)].view(R, K),
    "rows from the end": lambda x, rows: x[rows - T],
    "rows of int32": lambda x, rows: x[rows.int()],
}


class Experts(nn.Module):
    """Two grouped products of one gather, as w1 and w3 of SwiGLU."""

    def __init__(self, pick=SPELLINGS["index"]):
        super().__init__()
        self.pick = pick
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, N, K).bfloat16() / 8) for _ in range(2))

    def forward(self, x, rows, offs):
        picked = self.pick(x, rows)
        gate, up = (F.grouped_mm(picked, w.mT, offs=offs) for w in (self.w1, self.w3))
        return F.silu(gate) * up


def data(device, top=TOP):
    """x[T, K], the rows that each expert takes, and where each expert's end."""
    torch.manual_seed(0)
    x = torch.randn(T, K, device=device).bfloat16()
    chosen = torch.randn(T, E, device=device).topk(top).indices.flatten()
    offs = torch.bincount(chosen, minlength=E).cumsum(0).int()
    return x, chosen.argsort(stable=True) // top, offs


def compiled(f, recipe="fp8_rowwise", **options):
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager", **options}
    return torch.compile(f, backend="lowprec", options=options, fullgraph=True)


def step(f, model, x, *args):
    """Output and every gradient."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = f(x, *args)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def hoisted(compiles):
    return [c.counts["hoist"] for c in compiles]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_bit_changes(spelling, recipe, device, monkeypatch):
    model, args = Experts(SPELLINGS[spelling]).to(device), data(device)
    with observe() as compiles:
        made = step(compiled(model, recipe), model, *args)
    # Both quantizes of X by rows, and both that wgrad contracts, of which each has its amax.
    (count,) = hoisted(compiles)
    assert count == {"fp8_blockwise": 4, "fp8_tensorwise": 8}.get(recipe, 6)
    torch._dynamo.reset()
    monkeypatch.setattr(hoist, "run", lambda graph: 0)
    y, dx, *dw = step(compiled(model, recipe), model, *args)
    assert same_bits((made[0], *made[2:]), (y, *dw)) == ""
    assert close(made[1], dx) == ""  # a GPU adds up the rows of a gather in any order


def oracle(model, recipe):
    def f(x, rows, offs):
        gate, up = (
            lpcompile.grouped_mm(x[rows], w.mT, offs, recipe=recipe) for w in (model.w1, model.w3)
        )
        return F.silu(gate) * up

    return f


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", FP8)
def test_the_gradients_are_the_oracles(recipe, device):
    model, args = Experts().to(device), data(device)
    made = step(compiled(model, recipe), model, *args)
    for m, e in zip(made, step(oracle(model, recipe), model, *args), strict=True):
        assert close(m, e) == ""


@pytest.mark.parametrize("device", DEVICES)
def test_through_inductor_the_gradients_are_the_oracles(device):
    model, args = Experts().to(device), data(device)
    options = {"codegen": "inductor", "emulate_precision_casts": True}
    with observe() as compiles, config.patch(force_disable_caches=True):  # on a hit no pass runs
        made = step(compiled(model, **options), model, *args)
    assert hoisted(compiles) == [6]
    for m, e in zip(made, step(oracle(model, "fp8_rowwise"), model, *args), strict=True):
        assert close(m, e) == ""


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8"])
def test_a_linear_of_gathered_rows_quantizes_each_row_once(recipe, monkeypatch):
    x, rows, _ = data("cpu")
    model = nn.Linear(K, N, bias=False).bfloat16()

    def f(x, rows):
        return model(x[rows])

    with observe() as compiles:
        made = step(compiled(f, recipe), model, x, rows)
    assert hoisted(compiles) == [1]
    torch._dynamo.reset()
    monkeypatch.setattr(hoist, "run", lambda graph: 0)
    assert same_bits(made, step(compiled(f, recipe), model, x, rows)) == ""


def test_another_number_of_tokens_is_hoisted_by_the_same_graph():
    model, (x, rows, offs) = Experts(), data("cpu")
    f = compiled(model)
    again = torch.randn(T + 7, K).bfloat16(), torch.randint(T + 7, (R + 20,)), offs + 20
    with observe() as compiles:
        for args in ((x, rows, offs), again):
            for tensor in args[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
            made = f(*args)
            assert close(made, oracle(model, "fp8_rowwise")(*args)) == ""
    assert hoisted(compiles) == [6]


def shapes_of(calls, name):
    """The shape of the first operand of every call of an op."""
    return Counter(tuple(e.input_shapes[0]) for e in calls if e.name == f"lpcompile::{name}")


@pytest.mark.parametrize(
    ("picked", "again", "times"), [(2, 0, 1), (0.5, 0, 0), (2, 1, 0), (5, 1, 1)]
)
def test_rows_are_quantized_where_that_moves_fewer_bytes(picked, again, times):
    """again: the gathered rows are read by others too, and lie in memory."""
    x, _, _ = data("cpu")
    rows = torch.arange(int(T * picked)) % T
    w = torch.randn(N, K).bfloat16()

    def f(x, rows):
        gathered = x[rows]
        y = F.linear(gathered, w)
        return (y, gathered * 2) if again else y

    with torch.no_grad(), observe() as compiles:
        w = nn.Parameter(w)
        compiled(f)(x, rows)
    assert hoisted(compiles) == [times]


def test_rows_that_are_quantized_anyway_are_gathered_from_there():
    model, (x, rows, offs) = Experts(), data("cpu", 1)
    shared = nn.Linear(K, N, bias=False).bfloat16()

    def f(x, rows, offs):
        return model(x, rows, offs).sum() + shared(x).sum()

    with torch.no_grad():
        f = compiled(f)
        f(x, rows, offs)
    with torch.no_grad(), profile(record_shapes=True) as profiled:
        f(x, rows, offs)
    assert shapes_of(profiled.events(), "quantize_fp8_row")[(T, K)] == 1


@pytest.mark.parametrize("recipe", FP8)
def test_what_gathers_is_not_fused_with_what_reads_x_itself(recipe, monkeypatch):
    """A linear quantizes the same x, and the same gradient, both ways."""
    model, (x, rows, offs) = Experts(), data("cpu")
    model.shared, model.out = (nn.Linear(*s, bias=False).bfloat16() for s in ((K, N), (N, N)))
    w2 = nn.Parameter(torch.randn(E, N, N).bfloat16() / 8)
    model.w2 = w2

    def f(x, rows, offs):
        y = F.grouped_mm(model(x, rows, offs), w2, offs=offs)
        whole = model.out(F.silu(model.shared(x)))
        return torch.scatter_add(whole, 0, rows[:, None].expand(-1, N), y)

    with observe() as compiles:
        made = step(compiled(f, recipe), model, x, rows, offs)
    assert hoisted(compiles)[0] > 6 - 2 * (recipe == "fp8_blockwise")  # X, and dY of w2
    torch._dynamo.reset()
    monkeypatch.setattr(hoist, "run", lambda graph: 0)
    for m, e in zip(made, step(compiled(f, recipe), model, x, rows, offs), strict=True):
        assert close(m, e) == ""


def test_x_is_saved_for_the_backward_and_not_what_is_gathered_from_it(monkeypatch):
    model, args = Experts(), data("cpu")

    def saved():
        torch._dynamo.reset()
        with observe(measures=True) as compiles:
            step(compiled(model), model, *args)
        return compiles[0].saved_bytes.after

    after = saved()
    monkeypatch.setattr(hoist.gathers, "find", lambda x: None)
    assert after == 2 * T * K + R * 8 + E * 4 + 2 * 2 * R * N  # x, rows, offs; gate and up
    assert saved() > after + R * K


OTHERS = {
    "a mask": lambda x, rows: (x[rows >= 0], 0),
    "channels": lambda x, rows: (x[:, rows % K][:, :K].contiguous(), 0),
    "a row and a channel each": lambda x, rows: (x[rows[:, None], torch.arange(K)[None]], 0),
    "a channel of every row": lambda x, rows: (
        torch.gather(x, 1, (rows % K)[:T, None].expand(-1, K)),
        0,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_gather_of_rows_stays(name):
    x, rows, _ = data("cpu")
    x = x if name != "a mask" else torch.randn(R, K).bfloat16()
    w = nn.Linear(K, N, bias=False).bfloat16()

    def f(x, rows):
        picked, more = OTHERS[name](x, rows)
        return w(picked) + more

    with observe() as compiles, torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        made = step(compiled(f), w, x, rows)
    assert hoisted(compiles) == [0]

    def oracle(x, rows):
        picked, more = OTHERS[name](x, rows)
        return lpcompile.linear(picked, w.weight) + more

    for m, e in zip(made, step(oracle, w, x, rows), strict=True):
        assert close(m, e) == ""


def test_gathered_rows_that_the_backward_holds_are_read_where_they_are():
    model, args = Experts(), data("cpu")

    def f(x, rows, offs):
        picked = x[rows]
        gate = F.grouped_mm(picked, model.w1.mT, offs=offs)
        return torch.cat([gate * gate.sum() + F.grouped_mm(picked, model.w3.mT, offs=offs),
                          picked * picked], 1)  # fmt: skip

    with observe() as compiles:
        step(compiled(f), model, *args)
    assert hoisted(compiles) == [2]  # of fprop alone


def test_a_nan_reaches_what_the_row_reaches():
    model, (x, rows, offs) = Experts(), data("cpu")
    x[7, 3] = torch.nan
    y, dx, dw1, _ = step(compiled(model), model, x, rows, offs)
    assert torch.equal(y.isnan().any(1), rows == 7)
    assert not dx[torch.arange(T) != 7].isnan().any()
    experts = torch.bucketize((rows == 7).nonzero()[:, 0].int(), offs, right=True)
    assert dw1.isnan().any((1, 2)).nonzero()[:, 0].tolist() == experts.tolist()
