"""Rules mean the same whichever way in: of a module and all in it, and silent where obeyed."""

import logging

import pytest
import torch
from oracle import EAGER
from torch import nn

import lpcompile
from lpcompile.errors import RuleError
from lpcompile.options import Rule
from lpcompile.pipeline import observe


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.w2(torch.tanh(self.w1(x)))


class Block(nn.Module):
    """With a router of its own, which picks nothing that matters here."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.ffn = nn.RMSNorm(32), nn.Linear(32, 32), FFN()
        self.ffn.router = nn.Linear(32, 16)

    def forward(self, x):
        best = self.ffn.router(x).topk(1).values
        return x + best * self.ffn(self.q(self.norm(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def by_blocks(rules):
    model = Model().bfloat16()
    blocks = lpcompile.compile_blocks(model, rules=rules, options=EAGER)
    made = {}
    for path, block in blocks.items():
        torch._dynamo.reset()  # blocks that are alike share a compile
        with observe() as compiles:
            block(data())
        made |= {f"{path}.{r.module}": r.recipe for c in compiles for r in c.rows}
    return made


def explained(rules):
    report = lpcompile.explain(Model().bfloat16(), data(), options={**EAGER, "rules": rules})
    return {r.module: r.recipe for r in report.rows}


def converted(rules):
    report = lpcompile.convert(Model().bfloat16(), rules=rules)
    return {r.module: r.recipe for r in report.rows}


def data():
    return torch.randn(16, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize("way", [explained, by_blocks, converted])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([("layers.0", "bf16")], {"0.q": "bf16", "0.ffn.w1": "bf16", "0.ffn.w2": "bf16"}),
        ([("layers.1.*", "bf16")], {"1.q": "bf16", "1.ffn.w1": "bf16", "1.ffn.w2": "bf16"}),
        (
            [("*.2.ffn.w1", "nvfp4"), ("*.2.ffn", "mxfp8"), ("layers.2", "bf16")],
            {"2.q": "bf16", "2.ffn.w1": "nvfp4", "2.ffn.w2": "mxfp8"},
        ),
        # The rule of a module that holds a router does not name the router.
        ([("*.ffn", "mxfp8")], {f"{i}.ffn.{w}": "mxfp8" for i in range(3) for w in ("w1", "w2")}),
        ([("*.0.ffn.*", "mxfp8")], {f"0.ffn.{w}": "mxfp8" for w in ("w1", "w2", "router")}),
        ([("layers", "mxfp8")], dict.fromkeys(("q", "ffn.w1", "ffn.w2"), "mxfp8")),
    ],
    ids=["a block", "what is in a block", "nested", "around a router", "a router", "the blocks"],
)
def test_a_rule_holds_for_a_module_and_what_is_in_it(way, rules, expected, caplog):
    every = {
        f"layers.{i}.{module}": "bf16" if "router" in module else "fp8_rowwise"
        for i in range(3)
        for module in ("q", "ffn.w1", "ffn.w2", "ffn.router")
    }
    wanted = {
        name: next((r for end, r in expected.items() if name.endswith(end)), recipe)
        for name, recipe in every.items()
    }
    if way is converted:  # in modules alone, nothing says that this is a router
        wanted = {name: recipe for name, recipe in wanted.items() if "router" not in name}
    with caplog.at_level(logging.WARNING, "lpcompile"):
        made = way(rules)
    assert {name: made[name] for name in wanted} == wanted
    assert caplog.messages == []


def test_a_graph_that_rules_leave_in_bf16_is_no_warning(caplog):
    model = Model().bfloat16()
    lpcompile.compile_blocks(model, rules=[Rule("*", "bf16", last=0.15)], options=EAGER)
    with caplog.at_level(logging.INFO, "lpcompile"):
        model(data())
    levels = {r.levelno: r.message.partition(" GEMMs")[0] for r in caplog.records}
    assert levels == {logging.INFO: "lpcompile: fp8_rowwise: 0 of 12"}


@pytest.mark.parametrize("amount", [0, -1, 1.0, 1.5, float("nan"), True, "0.15"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_what_is_no_number_or_share_of_blocks_is_refused(end, amount):
    with pytest.raises(RuleError, match=f"{end} is a number of blocks"):
        Rule("*", "bf16", **{end: amount})


def test_an_iterator_of_rules_is_refused_or_read_once():
    one = [("layers.0", "bf16")]
    with pytest.raises(RuleError, match="iterator"):
        lpcompile.set_defaults(rules=iter(one))
    assert by_blocks(iter(one)) == by_blocks(one)


class Routed(nn.Module):
    """A router that is no module."""

    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Parameter(torch.randn(16, 32)), nn.Linear(32, 32)

    def forward(self, x):
        best = torch.nn.functional.linear(x, self.router).topk(1).values
        return x + best * self.up(x)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_rule_for_what_holds_blocks_names_no_router_of_theirs(blocks):
    model = nn.ModuleDict({"layers": nn.Sequential(Routed(), Routed())}).bfloat16()
    rules = [("layers", "fp8_tensorwise")]
    torch._dynamo.reset()
    with observe() as compiles:
        if blocks:
            lpcompile.compile_blocks(model, rules=rules, options=EAGER)
            model["layers"](data())
        else:
            options = {**EAGER, "rules": rules}
            torch.compile(lambda x: model["layers"](x), backend="lowprec", options=options)(data())
    routers = [row for c in compiles for row in c.rows if "router" in row.reason]
    assert routers
    assert {row.recipe for row in routers} == {"bf16"}
