"""The ways in: compile_blocks, the decorator, options and rules, and what they keep unchanged."""

import copy
import io
import json
import pickle
import re
from collections import Counter

import pytest
import torch
from torch import nn

import lpcompile
from lpcompile.errors import LowPrecisionError, OptionError, RecipeError, RuleError, StrictError
from lpcompile.options import Rule, parse
from lpcompile.pipeline import observe
from lpcompile.select import Depth

EAGER = {"rewrite": "all", "codegen": "eager"}


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@lpcompile.lowprec(options=EAGER)
class Decorated(Block):
    pass


Undecorated = Decorated


def model(depth=4):
    return Model(depth).bfloat16()


def x():
    return torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)


def recipes(compiles):
    return {(r.module, r.product): r.recipe for c in compiles for r in c.rows}


def test_blocks_are_found_and_alike_ones_share_one_compile():
    m = model(6)
    blocks = lpcompile.compile_blocks(m, options=EAGER)
    with observe() as compiles:
        m(x()).sum().backward()
    assert list(blocks) == [f"layers.{i}" for i in range(6)]
    assert len(compiles) == 1
    assert len(recipes(compiles)) == 6


def test_blocks_of_torchs_own_classes_are_compiled():
    m = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True), 3
    ).bfloat16()
    given, keys = (
        torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True),
        [*m.state_dict()],
    )
    assert [*lpcompile.compile_blocks(m, options=EAGER)] == [f"layers.{i}" for i in range(3)]
    with observe() as compiles:
        y = m(given)
        y.sum().backward()
    assert len(compiles) == 1
    narrowed = [(r.module, r.product) for r in compiles[0].rows if r.rewritten]
    assert Counter(narrowed) == {
        (module, product): 2 if module == "self_attn" else 1
        for module in ("self_attn", "linear1", "linear2")
        for product in ("fprop", "dgrad", "wgrad")
    }
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert [*twin.state_dict()] == keys
        lpcompile.compile_blocks(twin, options=EAGER)
        assert torch.equal(twin(given), y)
    lpcompile.switch(m, "fp8_tensorwise")
    with observe() as compiles:
        m(given)
    assert {r.recipe for r in compiles[0].rows if r.rewritten} == {"fp8_tensorwise"}


def test_a_decorated_class_that_inherits_torchs_forward_is_compiled():
    class Projection(nn.Linear):
        pass

    layer = lpcompile.lowprec(options=EAGER)(Projection)(32, 32).bfloat16()
    with observe() as compiles:
        layer(x()).sum().backward()
    assert {p for (_, p), recipe in recipes(compiles).items() if recipe == "fp8_rowwise"} == {
        *("fprop", "dgrad", "wgrad")
    }


def test_rules_by_depth_make_one_compile_for_each_kind_of_block():
    m = model(8)
    lpcompile.compile_blocks(m, rules=[Rule("*", "bf16", last=0.2)], options=EAGER)
    with observe() as compiles:
        m(x()).sum().backward()
    assert [set(recipes([c]).values()) for c in compiles] == [{"fp8_rowwise"}, {"bf16"}]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"last": 0.15}, [6, 7]),
        ({"first": 0.15}, [0, 1]),
        ({"last": 1}, [7]),
        ({"first": 3}, [0, 1, 2]),
    ],
)
def test_a_share_of_the_blocks_is_rounded_up(where, expected):
    paths = [f"layers.{i}.up" for i in range(8)]
    depth, rule = Depth(set(paths)), Rule("*", "bf16", **where)
    assert [i for i, path in enumerate(paths) if depth.admits(rule, path)] == expected


def test_rules_name_modules_by_their_path_in_the_whole_model():
    m = model(3)
    rules = [("layers.1.up", "fp8_tensorwise"), ("layers.*.down", "bf16")]
    lpcompile.compile_blocks(m, rules=rules, options=EAGER)
    with observe() as compiles:
        m(x()).sum().backward()
    assert len(compiles) == 2
    first, second = (recipes([c]) for c in compiles)
    assert first["up", "fprop"] == "fp8_rowwise"
    assert second["up", "fprop"] == "fp8_tensorwise"
    assert first["down", "fprop"] == second["down", "fprop"] == "bf16"


def test_of_two_rules_that_match_the_first_wins():
    rules = [("layers.*.up", "fp8_tensorwise"), ("layers.*", "bf16")]
    report = lpcompile.explain(model(1), x(), options={**EAGER, "rules": rules})
    assert {(r.module, r.recipe) for r in report.rows} == {
        ("layers.0.up", "fp8_tensorwise"),
        ("layers.0.down", "bf16"),
    }
    m = model(2)
    lpcompile.compile_blocks(m, rules=rules[::-1], options=EAGER)
    with observe() as compiles:
        m(x())
    assert set(recipes(compiles).values()) == {"bf16"}


def test_a_star_is_for_what_no_rule_before_it_names():
    m = model(2)
    rules = [("layers.*.up", "bf16"), ("*", "fp8_tensorwise")]
    lpcompile.compile_blocks(m, rules=rules, options=EAGER)
    with observe() as compiles:
        m(x())
    found = {module: recipe for (module, _), recipe in recipes(compiles).items()}
    assert found == {"up": "bf16", "down": "fp8_tensorwise"}


@pytest.mark.parametrize(
    "resolve",
    [
        lambda options: lpcompile.explain(model(), x(), options=options),
        lambda options: lpcompile.compile_blocks(model(), options=options),
    ],
    ids=["explain", "compile_blocks"],
)
def test_a_rule_that_matches_nothing_is_an_error_that_names_the_nearest(resolve):
    with pytest.raises(RuleError, match="upp"):
        resolve({**EAGER, "rules": [("layers.*.upp", "bf16")]})


def test_a_rule_that_matches_nothing_is_a_warning_in_a_bare_backend(caplog):
    m = model()
    m.compile(backend="lowprec", options={**EAGER, "rules": [("nothing", "bf16")]})
    m(x())
    assert "rule 'nothing' matched no GEMM" in caplog.text


def test_a_model_without_repeated_blocks_says_what_to_pass():
    with pytest.raises(LowPrecisionError, match="pass the blocks' class"):
        lpcompile.compile_blocks(Block())


@pytest.mark.parametrize(
    "compile",
    [
        lambda m: m.compile(backend="lowprec", options=EAGER),
        lambda m: lpcompile.compile_blocks(m, options=EAGER),
    ],
    ids=["model.compile", "compile_blocks"],
)
def test_a_compiled_model_keeps_its_keys_and_can_be_copied_and_saved(compile):
    m = model()
    before, given = list(m.state_dict()), x()
    compile(m)
    y = m(given)
    assert list(m.state_dict()) == before
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    again = model()
    again.load_state_dict(torch.load(file))
    compile(again)
    assert torch.equal(again(given), y)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert list(twin.state_dict()) == before
        compile(twin)
        assert torch.equal(twin(given), y)


def test_a_decorated_class_is_the_same_class_and_its_instances_pickle():
    assert Decorated is Undecorated
    block, given = Decorated().bfloat16(), x()
    with observe() as compiles:
        y = block(given)
        y.sum().backward()
    assert set(recipes(compiles).values()) == {"fp8_rowwise"}
    assert list(block.state_dict()) == list(Block().state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is Decorated
        assert torch.equal(twin(given), y)


def test_a_decorated_function_is_compiled():
    @lpcompile.lowprec("fp8_tensorwise", options=EAGER)
    def f(x, w):
        return x @ w.t()

    w = nn.Parameter(torch.randn(48, 32, dtype=torch.bfloat16))
    given = x()
    with observe() as compiles:
        y = f(given, w)
    assert set(recipes(compiles).values()) == {"fp8_tensorwise"}
    assert torch.equal(y, lpcompile.linear(given, w, recipe="fp8_tensorwise"))


def test_a_decorators_rule_that_matches_nothing_is_an_error_at_the_first_call():
    class Own(Block):
        pass

    own = lpcompile.lowprec(rules=[("side", "bf16")], options=EAGER)(Own)
    with pytest.raises(RuleError, match="side"):
        own().bfloat16()(x())


def test_an_annotated_region_keeps_its_recipe_forward_and_backward():
    class Annotated(Block):
        def forward(self, x):
            with torch.fx.traceback.annotate({"lowprec": "bf16"}):
                h = torch.tanh(self.up(x))
            with torch.fx.traceback.annotate({"lowprec": "fp8_tensorwise"}):
                return self.down(h)

    m = Annotated().bfloat16()
    m.compile(backend="lowprec", options=EAGER)
    with observe() as compiles:
        m(x()).sum().backward()
    made = recipes(compiles)
    assert {v for (module, _), v in made.items() if module == "up"} == {"bf16"}
    assert {v for (module, _), v in made.items() if module == "down"} == {"fp8_tensorwise"}
    assert len(made) == 6


def test_the_bare_name_reads_the_environment_over_the_defaults(monkeypatch):
    lpcompile.set_defaults(recipe="fp8_tensorwise", codegen="eager")
    try:
        assert parse().recipe == "fp8_tensorwise"
        monkeypatch.setenv("LPCOMPILE_OPTIONS", json.dumps({"recipe": "fp8_blockwise"}))
        assert (parse().recipe, parse().codegen) == ("fp8_blockwise", "eager")
        assert parse({"recipe": "bf16"}).recipe == "bf16"
    finally:
        lpcompile.set_defaults()
    monkeypatch.setenv("LPCOMPILE_OPTIONS", "recipe=fp8")
    with pytest.raises(OptionError, match="not JSON"):
        parse()


def test_defaults_that_change_are_for_a_model_like_one_compiled_before():
    seen = []
    try:
        for recipe in ("fp8_rowwise", "mxfp8", "mxfp8"):
            lpcompile.set_defaults(recipe=recipe, **EAGER)
            m = model(1)
            m.compile(backend="lowprec")
            with observe() as compiles:
                m(x())
            seen.append({recipe for (_, _), recipe in recipes(compiles).items()})
    finally:
        lpcompile.set_defaults()
    assert seen == [{"fp8_rowwise"}, {"mxfp8"}, set()]  # the third finds what the second made


def test_an_option_of_inductors_is_in_force_while_it_compiles():
    seen = []
    m = model(1)
    m.compile(backend="lowprec", options={**EAGER, "joint_custom_post_pass": seen.append})
    m(x())
    assert [type(graph) for graph in seen] == [torch.fx.Graph]


def test_inductors_keys_and_modes_stand_beside_ours():
    options = parse({"recipe": "fp8_rowwise", "epilogue_fusion": False}, "max-autotune")
    assert dict(options.inductor)["epilogue_fusion"] is False
    assert dict(options.inductor)["max_autotune"] is True


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"recpie": "bf16"}, OptionError, "recipe"),
        ({"max_autotun": True}, OptionError, "max_autotune"),
        ({"recipe": "fp8_rowise"}, RecipeError, "fp8_rowwise"),
        ({"rules": [("x", "fp8_tensor")]}, RecipeError, "fp8_tensorwise"),
        ({"rules": [{"patern": "x"}]}, RuleError, "pattern"),
        ({"rules": [Rule]}, RuleError, "pair"),
        ({"rules": "layers.*"}, RuleError, "list of rules"),
        ({"rules": {"layers.*": "bf16"}}, RuleError, "list of rules"),
        ({"rules": 3}, RuleError, "list of rules"),
        ({"recipe": ["bf16"]}, RecipeError, "bf16"),
        ({"rewrite": "everything"}, OptionError, "all"),
        ({"target": "h20"}, OptionError, "h200"),
        ({"strict": 1}, OptionError, "True or False"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_nearest(options, error, says):
    with pytest.raises(error, match=says):
        parse(options)


def test_an_unknown_option_reaches_the_user_of_torch_compile():
    m = model()
    m.compile(backend="lowprec", options={"recpie": "bf16"})
    with pytest.raises(Exception, match="did you mean 'recipe'"):
        m(x())


def test_other_libraries_names_are_understood():
    assert lpcompile.Options(recipe="rowwise_with_gw_hp").recipe == "rowwise_with_gw_hp"
    report = lpcompile.explain(model(1), x(), recipe="rowwise_with_gw_hp", options=EAGER)
    assert {r.reason for r in report.rows if not r.rewritten} == {
        "rowwise_with_gw_hp leaves wgrad in bf16"
    }


def test_strict_raises_where_a_linear_cannot_be_narrowed_and_not_where_it_is_ruled_bf16():
    options = {**EAGER, "strict": True}
    with pytest.raises(StrictError, match="float32"):
        lpcompile.explain(Model(1), torch.randn(16, 32), options=options)
    bf16 = {**options, "rules": [("layers.*", "bf16")]}
    assert lpcompile.explain(Model(1), torch.randn(16, 32), options=bf16).num_rewritten == 0
    costly = {**options, "rewrite": "profitable"}
    report = lpcompile.explain(model(1), x(), options=costly)
    assert {r.reason for r in report.rows} == {"unprofitable on h200"}


def test_a_users_own_recipe_goes_wherever_a_name_goes():
    row = lpcompile.Operand("fp8", "row")
    own = lpcompile.Recipe(lpcompile.Gemm(row, row), None, None)
    report = lpcompile.explain(model(1), x(), recipe=own, options=EAGER)
    assert {(r.product, r.recipe) for r in report.rows} == {
        ("fprop", "custom"),
        ("dgrad", "bf16"),
        ("wgrad", "bf16"),
    }


@pytest.mark.parametrize(
    ("misuse", "says"),
    [
        (lambda: lpcompile.explain(torch.relu, x()), "explain takes a torch.nn.Module, got a"),
        (lambda: lpcompile.convert(torch.relu), "convert takes a torch.nn.Module"),
        (lambda: lpcompile.switch(torch.relu, "bf16"), "switch takes a torch.nn.Module"),
        (lambda: lpcompile.compile_blocks(torch.relu), "compile_blocks takes a torch.nn.Module"),
        (lambda: lpcompile.lowprec(Block), "with parentheses"),
        (lambda: lpcompile.quantize(x(), "fp8"), "takes an Operand"),
        (lambda: lpcompile.dequantize(x()), "dequantize takes what quantize gives back"),
        (lambda: lpcompile.linear(x(), x(), torch.randn(16)), "bias[N] bf16 with w[N, K], got"),
        (lambda: lpcompile.convert(model(1), rules=[("q", "bf16")]), "matches no module; known: l"),
    ],
)
def test_what_is_given_the_wrong_thing_says_what_it_takes(misuse, says):
    with pytest.raises(LowPrecisionError, match=re.escape(says)):
        misuse()
