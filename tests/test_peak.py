"""What a graph holds at its peak: counted, and searched for the order that holds least."""

import itertools
import random

import pytest
import torch
from oracle import after_every_pass
from torch import fx
from torch._functorch import config as functorch_config
from torch._subclasses import FakeTensorMode

from lpcompile import ops, peak
from lpcompile.bench.models import EXPERTS, LLAMAS, built, experts_layer, llama_layer
from lpcompile.explain import trace
from lpcompile.graph import aten, call
from lpcompile.ops import pointwise
from lpcompile.options import parse
from lpcompile.peak import Memory, Part, Step

GIB = 2**30
# What an H200 holds in bf16 at the peak, beside weights and dY (torch 2.11, `bench experts`).
BF16 = {
    "deepseek-v3-16b": 2.040,
    "deepseek-v3-16b-ep8": 2.145,
    "deepseek-v3-671b": 2.66,
    "llama4-scout": 4.32,
    "qwen3-30b": 2.313,
}


def backward_of(layer, recipe):
    """The backward of a layer, as the passes leave it, of fake tensors."""
    options = parse({"recipe": recipe, "rewrite": "all", "codegen": "eager"})
    meta = torch.device("meta")
    eagerly = functorch_config.patch(force_non_lazy_backward_lowering=True)
    with eagerly, after_every_pass() as seen:
        trace(built(layer, meta), layer.inputs(meta), {}, options)
    _, backward = seen
    return backward


def highest(graph):
    return max(Memory(graph).lives(list(graph.nodes)))


@pytest.mark.parametrize("name", BF16)
def test_experts_hold_no_more_than_in_bf16_under_one_scale(name):
    layer = experts_layer(EXPERTS[name], ragged=False)
    backward = backward_of(layer, "fp8_tensorwise")
    assert highest(backward) / GIB < BF16[name] + 0.005
    # Many small experts: X.T comes from the forward, and lies there in 8 bits.
    late = [n for n in backward.nodes if n.target is ops.quantize_fp8_grouped_t.op]
    assert len(late) == (0 if name in ("deepseek-v3-16b", "qwen3-30b") else 1)


@pytest.mark.parametrize("name", BF16)
def test_experts_hold_no_more_than_in_bf16(name):
    layer = experts_layer(EXPERTS[name], ragged=False)
    backward = backward_of(layer, "fp8_rowwise")
    assert highest(backward) / GIB < BF16[name] + 0.005
    amaxes = [n.args[2] for n in backward.nodes if n.target is ops.fused_amax.op]
    # h's by themselves only where its wgrad has to come before the gradient of h.
    assert sorted(map(len, amaxes)) == ([1, 2, 4] if name.endswith("ep8") else [2, 5])


def test_all_maxima_of_swiglu_are_one_read_for_a_thousandth_of_the_peak(monkeypatch):
    layer, peaks, results = llama_layer("ffn", LLAMAS["llama3-8b"]), [], []
    for slack in (0, peak.SLACK):
        monkeypatch.setattr(peak, "SLACK", slack)
        backward = backward_of(layer, "fp8_rowwise")
        peaks.append(highest(backward))
        programs = [n.args[1] for n in backward.nodes if n.target is ops.fused_amax.op]
        results.append(max(len(pointwise.parse(p).results) for p in programs))
    assert results == [2, 3]
    assert 1 < peaks[1] / peaks[0] < 1.001


def traced(*calls):
    """A graph of calls, whose arguments go by name; "saved" is a [64, 64] one."""
    graph, made = fx.Graph(), {}
    made["saved"] = graph.placeholder("saved")
    with FakeTensorMode():
        made["saved"].meta["val"] = torch.empty(64, 64)
    for name, target, *args in calls:
        given = (made[a] if isinstance(a, str) and a in made else a for a in args)
        made[name] = call(graph, target, *given)
    graph.output(made[name])
    return graph, made


BYTES = 64 * 64 * 4
CHAIN = (
    ("a", aten.mm.default, "saved", "saved"),
    ("view", aten.view.default, "a", [64 * 64]),
    ("square", aten.mul.Tensor, "view", "view"),
    ("exp", aten.exp.default, "square"),
    ("b", aten.mm.default, "saved", "saved"),
    ("back", aten.view.default, "exp", [64, 64]),
    ("c", aten.mm.default, "b", "back"),
)


def test_what_is_fused_takes_no_memory_and_what_overwrites_its_input_none_of_its_own():
    graph, made = traced(*CHAIN)
    lives = dict(zip(graph.nodes, Memory(graph).lives(list(graph.nodes)), strict=True))
    # "square" is never written; "exp" is, over "a".
    expected = {"saved": 1, "a": 2, "square": 2, "exp": 2, "b": 3, "c": 3}
    assert {name: lives[made[name]] / BYTES for name in expected} == expected


@pytest.mark.parametrize("between", ["a collective", "a random number", "neither"])
def test_what_all_ranks_must_meet_in_one_order_stays_where_it_is(between):
    target, args = {
        "a collective": (torch.ops._c10d_functional.all_reduce.default, ("a", "sum", "0")),
        "a random number": (aten.rand_like.default, ("a",)),
        "neither": (aten.cumsum.default, ("a", 0)),
    }[between]
    b = ("b", aten.mm.default, "saved", "saved")
    graph, made = traced(
        CHAIN[0], b, ("r", target, *args), ("c", aten.mm.default, "saved", "saved")
    )
    nodes = [made[name] for name in "abrc"]
    a, b, r, c = Part(Memory(graph), nodes, []).single
    assert r.needs == a.bits | (0 if between == "neither" else b.bits)
    assert c.needs == (0 if between == "neither" else a.bits | b.bits | r.bits)


def replayed(order, dies, live):
    """The peak of an order, counted anew."""
    done, highest, alive = 0, 0, live
    for step in order:
        highest = max(highest, alive + step.during)
        before, done = done, done | step.bits
        alive += step.after
        alive -= sum(size for size, bits in dies if not bits & ~done and bits & ~before)
    return highest


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_the_steps_holds_less(seed):
    random.seed(seed)
    num = 6
    steps, readers = [], []
    for i in range(num):
        needs = sum(1 << j for j in range(i) if random.random() < 0.3)
        made = random.randrange(1, 10)
        steps.append(Step((i,), 1 << i, needs, made + random.randrange(3), made, 0))
        readers.append(1 << i)
    for i, step in enumerate(steps):
        for j in range(i):
            readers[j] |= step.bits if step.needs >> j & 1 else 0
    dies = [
        (s.after, bits) for s, bits in zip(steps, readers, strict=True) if random.random() < 0.8
    ]
    dies.append((8, 0b101))  # made before, read by two of them
    orders = [
        order
        for order in itertools.permutations(steps)
        if all(not s.needs & ~sum(t.bits for t in order[:i]) for i, s in enumerate(order))
    ]
    least = min(replayed(order, dies, 8) for order in orders)
    found, order = peak._search(steps, dies, 8, 0)
    assert sorted(s.bits for s in order) == [s.bits for s in steps]
    assert found == replayed(order, dies, 8) == least


def test_what_is_joined_costs_its_inputs_once_and_only_where_the_peak_allows():
    casts = [Step((i,), 1 << i, 0, 4, 4, 3) for i in range(2)]
    both = Step((0, 1), 0b11, 0, 8, 8, 4)
    reads = [Step((i + 2,), 1 << i + 2, 1 << i, 1, 1, 0) for i in range(2)]
    dies = [(4, 0b0101), (4, 0b1010)]
    for floor, cost in ((0, 6), (8, 6), (9, 4)):
        _, order = peak._search([*casts, *reads, both], dies, 0, floor)
        assert sum(step.cost for step in order) == cost


def test_a_graph_of_many_paths_is_walked_once():
    """Pointwise ops that read each other twice double the paths with every op."""
    calls = [("h0", aten.exp.default, "saved")]
    for i in range(60):
        calls += [(f"c{i}", aten.cos.default, f"h{i}")]
        calls += [(f"h{i + 1}", aten.mul.Tensor, f"h{i}", f"c{i}")]
    graph, made = traced(*calls, ("last", aten.mm.default, "h60", "saved"))
    assert made["saved"] in Memory(graph).reads[made["last"]]
