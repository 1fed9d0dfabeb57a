"""``switch``: a run changes its recipe between two steps and nothing else of it changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import EAGER, NVFP4_PARTS
from torch import nn
from torch.utils.checkpoint import checkpoint

import lpcompile
from lpcompile.errors import LowPrecisionError, RecipeError
from lpcompile.options import Rule
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES

FORWARD_BF16 = NVFP4_PARTS["fprop in bf16"]


class Block(nn.Module):
    def __init__(self, checkpoints=False):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.checkpoints = checkpoints

    def body(self, x):
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x)


@lpcompile.lowprec("nvfp4", options=EAGER)
class Decorated(Block):
    pass


class Model(nn.Module):
    def __init__(self, block=Block, depth=3, **more):
        super().__init__()
        self.layers = nn.ModuleList(block(**more) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def whole(recipe="nvfp4", **more):
    m = Model(**more).bfloat16()
    m.compile(backend="lowprec", options={"recipe": recipe, **EAGER}, fullgraph=True)
    return m


def wrapped(recipe="nvfp4", **more):
    options = {"recipe": recipe, **EAGER}
    return torch.compile(Model(**more).bfloat16(), backend="lowprec", options=options)


def by_blocks(recipe="nvfp4", rules=(), **more):
    m = Model(**more).bfloat16()
    lpcompile.compile_blocks(m, recipe=recipe, rules=rules, options=EAGER)
    return m


def decorated(**more):
    return Model(Decorated, **more).bfloat16()


WAYS = [whole, wrapped, by_blocks, decorated]


def batch():
    """x, which requires grad as a later block's does, so that one compile serves all."""
    return torch.randn(32, 32, dtype=torch.bfloat16, requires_grad=True)


def step(model, optimizer, x, seed):
    torch.manual_seed(seed)
    loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def narrowed(compiles):
    """Products narrowed in each compile."""
    return [{r.product for r in c.rows if r.rewritten} for c in compiles]


ALL, BACKWARD = {"fprop", "dgrad", "wgrad"}, {"dgrad", "wgrad"}


@pytest.mark.parametrize("way", WAYS)
def test_a_switch_compiles_once_and_switching_back_not_at_all(way):
    m, x = way(), batch()
    optimizer = torch.optim.AdamW(m.parameters())
    seen = []
    for seed, recipe in enumerate([None, FORWARD_BF16, "nvfp4", FORWARD_BF16, "nvfp4"]):
        if recipe is not None:
            lpcompile.switch(m, recipe)
        with observe() as compiles:
            step(m, optimizer, x, seed)
        seen.append(narrowed(compiles))
    assert seen == [[ALL], [BACKWARD], [], [], []]


@pytest.mark.parametrize("way", WAYS)
def test_steps_after_a_switch_are_those_of_a_run_that_began_so_from_the_checkpoint(way):
    m, x = way(), batch()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for seed in range(2):
        step(m, optimizer, x, seed)
    weights = copy.deepcopy({k.removeprefix("_orig_mod."): v for k, v in m.state_dict().items()})
    state = copy.deepcopy(optimizer.state_dict())
    lpcompile.switch(m, FORWARD_BF16)
    assert {k.removeprefix("_orig_mod.") for k in m.state_dict()} == set(weights)
    on = [step(m, optimizer, x, seed) for seed in (2, 3)]

    # A seed is drawn for each compiled graph.
    again = (whole if way in (whole, wrapped) else by_blocks)(FORWARD_BF16)
    again.load_state_dict(weights)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(state)
    assert [step(again, optimizer, x, seed) for seed in (2, 3)] == on
    for a, b in zip(m.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_switch_leaves_the_optimizers_state_alone():
    m, x = whole(), batch()
    optimizer = torch.optim.AdamW(m.parameters())
    step(m, optimizer, x, 0)
    before = copy.deepcopy(optimizer.state_dict())
    parameters = [id(p) for p in m.parameters()]
    lpcompile.switch(m, "mxfp8")
    assert [id(p) for p in m.parameters()] == parameters
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before["state"][key][name]) for name, v in state.items())


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8"])
def test_a_checkpointed_run_switches_to_the_gradients_of_one_that_is_not_checkpointed(recipe):
    grads = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        m, x = whole("bf16", checkpoints=checkpoints), batch()
        m(x).sum().backward()
        m.zero_grad()
        lpcompile.switch(m, recipe)
        with observe() as compiles:
            m(x).sum().backward()
        assert ALL in narrowed(compiles)
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rules_stay_in_force_and_each_kind_of_block_compiles_once():
    m, x = by_blocks(rules=[Rule("*", "bf16", last=0.15)], depth=7), batch()
    m(x).sum().backward()
    lpcompile.switch(m, "mxfp8")
    with observe() as compiles:
        m(x).sum().backward()
    recipes = [{r.recipe for r in c.rows} for c in compiles]
    assert recipes == [{"mxfp8"}, {"bf16"}]


def test_more_switches_than_dynamo_grants_recompiles():
    m, x = by_blocks("bf16", rules=[Rule("*.down", "bf16", last=1)], depth=2), batch()
    names = [name for name in RECIPES if name != "bf16"]
    for recipe in ["bf16", *names, FORWARD_BF16]:
        lpcompile.switch(m, recipe)
        with observe() as compiles:
            m(x).sum().backward()
            with torch.no_grad():
                m(x)
        done = {r.recipe for c in compiles for r in c.rows if r.rewritten}
        if recipe in names:
            assert done == {recipe}


def test_switching_says_what_it_switched_and_what_there_is_not():
    assert lpcompile.switch(by_blocks(), "mxfp8") == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(LowPrecisionError, match="nothing to switch"):
        lpcompile.switch(Model(), "mxfp8")
    other = Model()
    other.compile(backend="aot_eager")
    with pytest.raises(LowPrecisionError, match="nothing to switch"):
        lpcompile.switch(other, "mxfp8")
    with pytest.raises(RecipeError, match="mxfp8"):
        lpcompile.switch(whole(), "mxpf8")


def test_a_switched_instance_of_a_decorated_class_leaves_the_others_and_is_copied_switched():
    switched, other = (Decorated().bfloat16() for _ in range(2))
    lpcompile.switch(switched, "mxfp8")
    x = batch()
    for made, recipe in ((switched, "mxfp8"), (other, "nvfp4")):
        torch._dynamo.reset()
        with observe() as compiles:
            made(x).sum().backward()
        assert {r.recipe for c in compiles for r in c.rows} == {recipe}
    twin = pickle.loads(pickle.dumps(switched))
    assert torch.equal(twin(x), switched(x))


def run(f, x, w, dy):
    x, w = x.detach().requires_grad_(), nn.Parameter(w.detach())
    y = f(x, w)
    torch.manual_seed(3)  # for the seed that a stochastic backward draws
    y.backward(dy)
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("part", NVFP4_PARTS)
def test_each_part_of_nvfp4_switched_gives_the_oracles_bits_and_others_than_the_whole(part):
    x, w, dy = (torch.randn(s, dtype=torch.bfloat16) for s in ((48, 64), (96, 64), (48, 96)))

    class One(nn.Module):
        def forward(self, x, w):
            return F.linear(x, w)

    m = One()
    m.compile(backend="lowprec", options={"recipe": "nvfp4", **EAGER})
    complete = run(m, x, w, dy)
    lpcompile.switch(m, NVFP4_PARTS[part])
    made = run(m, x, w, dy)
    expected = run(lambda x, w: lpcompile.linear(x, w, recipe=NVFP4_PARTS[part]), x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    differs = [not torch.equal(a, b) for a, b in zip(made, complete, strict=True)]
    assert (
        differs
        == {
            "no Hadamard": [False, False, True],
            "no stochastic rounding": [False, True, True],
            "1x16 weights": [True, True, False],
            "wgrad in bf16": [False, False, True],
            "fprop in bf16": [True, False, False],
        }[part]
    )
