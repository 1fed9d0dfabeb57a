"""``explain``: what it says of a model equals what the backend does, and nothing of it changes."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import lpcompile
from lpcompile.errors import LowPrecisionError
from lpcompile.pipeline import observe
from lpcompile.report import Report, Row

EAGER = {"rewrite": "all", "codegen": "eager"}
PRODUCTS = ("fprop", "dgrad", "wgrad")


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.w2 = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return x + self.w2(F.silu(self.w1(x)) * self.w3(x))


@pytest.fixture
def mesh():
    """Of two ranks, of which this process is one and the other nobody."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def data(device="cpu"):
    return torch.randn(2, 16, 64, dtype=torch.bfloat16, device=device, requires_grad=True)


def made(device="cpu"):
    with torch.device(device):
        return FFN().bfloat16()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_says_what_the_backend_does_and_changes_nothing(device):
    model, x = made(device), data()
    before = {name: (id(p), p.device, p._version) for name, p in model.named_parameters()}
    given = data(device)
    state = torch.get_rng_state()
    report = lpcompile.explain(model, given, options=EAGER)
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: (id(p), p.device, p._version) for name, p in model.named_parameters()}
    assert after == before
    model = made()
    with observe(measures=True) as compiles:
        torch.compile(model, backend="lowprec", options=EAGER)(x).sum().backward()
    assert report.rows == compiles[0].rows
    assert report.saved_bytes == compiles[0].saved_bytes
    assert len(report.rows) == 9


def test_the_table_says_of_every_block_what_was_decided_linear_by_linear():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(FFN() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    wgrad = lpcompile.Recipe(None, None, lpcompile.RECIPES["mxfp8"].wgrad)
    rules = [("blocks.1.w2", wgrad), lpcompile.Rule("*", "bf16", last=1), ("*.w1", "bf16")]
    report = lpcompile.explain(Model().bfloat16(), data(), options={**EAGER, "rules": rules})
    cells = [line.split("│")[1:-1] for line in str(report).splitlines() if line.startswith("│")]
    assert [(c[0].strip(), c[1].strip(), c[-2].strip(), c[-1].strip()) for c in cells] == [
        line
        for linear, others in (("w1", "0-2"), ("w3", "0-2"), ("w2", "0,2"))
        for product in PRODUCTS
        for line in told(linear, others, product)
    ]
    model = Model().bfloat16()
    report = lpcompile.explain(model, data(), options={**EAGER, "rewrite": "profitable"})
    assert re.search(r"unprofitable on h200: \d+ us in bf16, \d+ us\s.*narrowed", str(report), re.S)


def test_a_line_of_the_table_names_no_module_that_is_not_in_it():
    def shown(*paths):
        rows = [Row(path, "fprop", 16, 16, 16, 1, "bf16", False, "so") for path in paths]
        return str(Report(rows))

    assert "layers.0-1.experts.0-1.w (x4)" in shown(
        *(f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(2))
    )
    assert "layers.*.experts.*.w (x2)" in shown("layers.0.experts.1.w", "layers.1.experts.0.w")


def told(linear, others, product):
    """The lines of one product of a linear: those of the blocks that no rule is for, and others."""
    ruled = "rule '*.w1'" if linear == "w1" else ""
    times = "(x3)" if others == "0-2" else "(x2)"
    alike = (
        f"blocks.{others}.{linear} {times}",
        product,
        "bf16" if ruled else "fp8_rowwise",
        ruled,
    )
    last = (f"blocks.3.{linear}", product, "bf16", "rule '*' of the last 1")
    if linear != "w2":
        return [alike, last]
    why = "rule 'blocks.1.w2'"
    if product == "wgrad":
        own = ("blocks.1.w2", product, "custom", why)
    else:
        own = ("blocks.1.w2", product, "bf16", f"{why}; custom leaves {product} in bf16")
    return [alike, own, last]


def test_linears_that_share_x_share_what_quantizing_it_costs():
    class Projections(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(4096, 512, bias=False) for _ in range(count))

        def forward(self, x):
            return torch.cat([linear(x) for linear in self.each], -1)

    narrowed = {}
    for count in (1, 3):
        with torch.device("meta"):
            model = Projections(count).bfloat16()
            x = torch.randn(2, 8192, 4096, dtype=torch.bfloat16, requires_grad=True)
        report = lpcompile.explain(model, x, options={"target": "h200"})
        narrowed[count] = {r.product for r in report.rows if r.rewritten}
        assert all(r.rewritten == r.estimate.profitable for r in report.rows)
    assert "wgrad" not in narrowed[1]
    assert "wgrad" in narrowed[3]
    report = lpcompile.explain(model, x, recipe="bf16")
    assert {r.estimate for r in report.rows} == {None}


def test_a_transposed_product_is_predicted_to_take_as_long():
    class Two(nn.Module):
        """Products of one x, which is made by a pointwise op, each with a weight of its own."""

        def __init__(self, transposed):
            super().__init__()
            self.w1, self.w2 = (nn.Parameter(torch.randn(14336, 4096)) for _ in range(2))
            self.transposed = transposed

        def forward(self, h):
            x = F.relu(h)
            if self.transposed:
                return (self.w1 @ x.t()).t(), (self.w2 @ x.t()).t()
            return x @ self.w1.t(), x @ self.w2.t()

    said = []
    for transposed in (False, True):
        with torch.device("meta"):
            model = Two(transposed).bfloat16()
            h = torch.randn(16384, 4096, dtype=torch.bfloat16, requires_grad=True)
        report = lpcompile.explain(model, h)
        said.append(sorted((r.product, r.m, r.n, r.k, r.reason) for r in report.rows))
    assert len(said[0]) == 6
    assert said[0] == said[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_parallel_model_shows_the_sizes_of_a_shard(mesh, device):
    plan = {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()}
    model = parallelize_module(made(device), mesh, plan)
    parameters = list(model.parameters())
    report = lpcompile.explain(model, data(device), options=EAGER)
    shown = sorted((r.module, r.product, r.m, r.n, r.k) for r in report.rows if r.rewritten)
    sizes = {"w1": (32, 48, 64), "w3": (32, 48, 64), "w2": (32, 64, 48)}
    assert shown == sorted((name, p, *mnk) for name, mnk in sizes.items() for p in PRODUCTS)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_model_after_fully_shard_is_refused_with_what_to_do(mesh):
    model = fully_shard(made(), mesh=mesh)
    with pytest.raises(LowPrecisionError, match="before fully_shard"):
        lpcompile.explain(model, data(), options=EAGER)


def test_a_tied_head_is_one_here_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up = nn.Embedding(80, 64), nn.Linear(64, 64, bias=False)
            self.head = nn.Linear(64, 80, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i):
            return self.head(torch.tanh(self.up(self.table(i))))

    model, i = Tied().bfloat16(), torch.randint(0, 80, (4, 16))
    report = lpcompile.explain(model, i, options=EAGER)
    assert {r.module for r in report.rows if r.rewritten} == {"up"}
    assert model.head.weight is model.table.weight


class Chosen(nn.Module):
    """Half of the rows, those of the highest scores, through one linear."""

    def __init__(self, by_value=False):
        super().__init__()
        self.up, self.by_value = nn.Linear(64, 64), by_value

    def forward(self, x):
        if self.by_value and x.sum().item() > 0:
            return x
        (rows,) = torch.where(x.sum(1) > 0)
        return torch.zeros_like(x).index_add(0, rows, self.up(x[rows]))


def test_rows_that_are_known_only_when_it_runs_are_no_obstacle():
    model, x = Chosen().bfloat16(), data().flatten(0, 1)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = lpcompile.explain(model, x, options=EAGER)
    assert [(r.product, r.m, r.rewritten) for r in report.rows] == [
        (product, None, True) for product in ("fprop", "dgrad", "wgrad")
    ]


def test_a_model_that_decides_by_a_value_is_refused_with_what_to_do():
    with pytest.raises(LowPrecisionError, match="Chosen decides by the value of a tensor"):
        lpcompile.explain(Chosen(by_value=True).bfloat16(), data().flatten(0, 1), options=EAGER)


@pytest.mark.parametrize(
    "compile",
    [
        lambda m: m.compile(backend="lowprec", options=EAGER),
        lambda m: lpcompile.compile_blocks(m, blocks=[m], options=EAGER),
        lambda m: torch.compile(m, backend="lowprec", options=EAGER),
    ],
    ids=["model.compile", "compile_blocks", "torch.compile"],
)
def test_a_model_that_is_compiled_and_has_run_is_explained_like_any_other(compile):
    model, x = made(), data()
    expected = lpcompile.explain(model, x, recipe="mxfp8", options=EAGER)
    compiled = compile(model)
    model = compiled if isinstance(compiled, nn.Module) else model
    y = model(x)
    assert lpcompile.explain(model, x, recipe="mxfp8", options=EAGER) == expected
    assert torch.equal(model(x), y)


@torch.library.custom_op("lpcompile_tests::experts", mutates_args=())
def experts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w[0].t()


experts.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[1]))
experts.register_autograd(
    lambda ctx, dy: (experts(dy, ctx.w.mT), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "w", inputs[1]),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_another_library_is_listed_with_its_reason(dtype):
    class Model(FFN):
        def __init__(self):
            super().__init__()
            self.w4 = nn.Parameter(torch.randn(4, 48, 64))

        def forward(self, x):
            return experts(super().forward(x), self.w4)

    report = lpcompile.explain(Model().to(dtype), data().to(dtype), options=EAGER)
    (row,) = [r for r in report.rows if "lpcompile_tests::experts" in r.reason]
    assert row[:6] == ("", "fprop", 16, 48, 64, 4)
    assert ("make that bfloat16" in row.reason) is (dtype == torch.float32)
    assert report.num_rewritten == (9 if dtype == torch.bfloat16 else 0)


def test_a_whole_layer_in_one_op_is_listed_and_its_training_narrowed():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).bfloat16()
    with torch.no_grad():
        x = data().detach()
        report = lpcompile.explain(layer.eval(), x, options=EAGER)
    assert [r.m for r in report.rows] == [x.shape[:-1].numel()]
    assert [r.reason for r in report.rows] == [
        "aten::_transformer_encoder_layer_fwd multiplies inside itself"
    ]
    assert lpcompile.explain(layer.train(), data(), options=EAGER).num_rewritten == 12
