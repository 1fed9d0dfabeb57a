"""What a dump writes is the graph: its Python gives the bits that the compiled function gives."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensorMode

import lpcompile
from lpcompile import LowPrecisionWarning
from lpcompile.errors import OptionError
from lpcompile.ops.define import same_bits
from lpcompile.pipeline import observe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EAGER = {"rewrite": "all", "codegen": "eager"}
GEMM = """\
(root)  fprop  m=32, n=48, k=64  fp8_rowwise
primals_2 is w
primals_1 is x
  before
    permute = aten.permute.default(primals_2, [1, 0])
    mm = aten.mm.default(primals_1, permute)
  after
    amax_column_1 = lpcompile.amax_column(primals_1)
    values, scales = lpcompile.quantize_fp8_row(primals_1, torch.float8_e4m3fn, True, COLUMNS_1)
    amax_column_2 = lpcompile.amax_column(primals_2)
    values_1, scales_1 = lpcompile.quantize_fp8_row(primals_2, torch.float8_e4m3fn, True, COLUMNS_2)
    mm = lpcompile.scaled_mm(values, scales, values_1, scales_1, torch.bfloat16, True)
""".replace("COLUMNS", "columns=amax_column")


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.w1 = nn.Linear(64, 128, bias=False)
        self.w2 = nn.Linear(128, 64)

    def forward(self, x):
        return self.w2(F.silu(self.w1(self.norm(x))))


def compiled(f, **options):
    return torch.compile(f, backend="lowprec", options={**EAGER, **options})


def operands(device="cpu"):
    x = torch.randn(32, 64, device=device).bfloat16().requires_grad_()
    return x, nn.Parameter(torch.randn(48, 64, device=device).bfloat16())


def project(x, w):
    return F.linear(x, w)


def linear(folder, device="cpu"):
    """Dump a linear, and give x, w, dY and what the compiled function made: Y, dX, dW."""
    x, w = operands(device)
    dy = torch.randn(32, 48, device=device).bfloat16()
    with lpcompile.dump(folder):
        y = compiled(project)(x, w)
        y.backward(dy)
    return (x, w, dy), (y, x.grad, w.grad)


def graphs(folder):
    """The files that are graphs."""
    files = (f for f in folder.rglob("*.py") if not f.name.startswith(("bytecode", "inductor")))
    return sorted(files)


def runs(file):
    """Run a file as the main program, and give what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        runpy.run_path(str(file), run_name="__main__")
    return printed


def without_comments(text):
    return "\n".join(line.partition("  # ")[0].rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("device", DEVICES)
def test_the_python_of_a_joint_graph_makes_the_bits_that_the_compiled_function_makes(
    tmp_path, device
):
    given, made = linear(tmp_path, device)
    module = runpy.run_path(str(tmp_path / "graph_0" / "joint_1_linear.py"))
    again = module["forward"](*(t.detach() for t in given))
    for a, b in zip(again, made, strict=True):
        assert same_bits(a, b.detach()) == ""


def test_forward_and_backward_follow_from_each_other(tmp_path):
    (x, w, dy), (y, dx, dw) = linear(tmp_path)
    parts = {
        name: runpy.run_path(str(tmp_path / "graph_0" / f"{name}.py"))
        for name in ("forward", "backward")
    }
    made = parts["forward"]["forward"](x.detach(), w.detach())
    named = dict(zip(parts["forward"]["OUTPUTS"], made, strict=True))
    named["tangents_1"] = dy
    wanted = parts["backward"]["inputs"]()
    grads = parts["backward"]["forward"](**{name: named[name] for name in wanted})
    assert [torch.equal(a, b) for a, b in zip((made[0], *grads), (y, dx, dw), strict=True)] == [
        True
    ] * 3


def test_the_graph_before_the_passes_is_bf16s(tmp_path):
    (x, w, dy), _ = linear(tmp_path)
    module = runpy.run_path(str(tmp_path / "graph_0" / "joint_0_traced.py"))
    y, dx, dw = module["forward"](x.detach(), w.detach(), dy)
    assert torch.equal(y, F.linear(x, w))
    assert torch.equal(dx, dy @ w)
    assert torch.equal(dw, dy.t() @ x)


def test_a_gemm_is_read_before_and_after_in_a_few_lines(tmp_path):
    linear(tmp_path)
    text = without_comments((tmp_path / "graph_0" / "gemms.txt").read_text())
    assert text.split("\n\n")[0] + "\n" == GEMM
    products = [block.split()[1] for block in text.split("\n\n") if block.strip()]
    assert sorted(products) == ["dgrad", "fprop", "wgrad"]


def test_a_product_that_a_pass_made_of_a_loop_is_read_before_and_after(tmp_path):
    def experts(x, w):
        return torch.cat([part @ w[e].t() for e, part in enumerate(x.split(16))])

    x = torch.randn(32, 64).bfloat16().requires_grad_()
    w = nn.Parameter(torch.randn(2, 48, 64).bfloat16())
    with lpcompile.dump(tmp_path):
        compiled(experts)(x, w).sum().backward()
    fprop = (tmp_path / "graph_0" / "gemms.txt").read_text().split("fprop")[1]
    before, after, *_ = fprop.split("  after\n")
    assert "_grouped_mm = aten._grouped_mm.default(" in before
    assert "_grouped_mm = lpcompile.scaled_grouped_mm(" in after


def test_a_diff_touches_the_gemms_alone(tmp_path):
    linear(tmp_path)
    lines = (tmp_path / "graph_0" / "joint_1_linear.diff").read_text().splitlines()
    removed = [line[1:].split("=")[1] for line in lines if line[:5] == "-    "]
    assert {r.partition("(")[0].strip() for r in removed} == {
        "aten.mm.default",
        "aten.permute.default",
    }


def test_every_graph_of_a_module_runs_and_prints_its_outputs(tmp_path):
    model, x = FFN().bfloat16(), torch.randn(2, 16, 64).bfloat16().requires_grad_()
    with lpcompile.dump(tmp_path):
        function = compiled(model)
        function(x).sum().backward()
        with torch.no_grad():
            function(x)
    printed = {f"{f.parent.name}/{f.name}": runs(f) for f in graphs(tmp_path)}
    assert sorted(printed) == [
        "graph_0/backward.py",
        "graph_0/backward_0_post_grad.py",
        "graph_0/backward_1_fuse_columns.py",
        "graph_0/backward_2_fuse.py",
        "graph_0/backward_3_fuse_whole.py",
        "graph_0/backward_4_emulate.py",
        "graph_0/backward_5_fuse_micro.py",
        "graph_0/backward_6_schedule.py",
        "graph_0/backward_7_addend.py",
        "graph_0/forward.py",
        "graph_0/forward_0_post_grad.py",
        "graph_0/forward_1_fuse_columns.py",
        "graph_0/forward_2_fuse.py",
        "graph_0/forward_3_fuse_whole.py",
        "graph_0/forward_4_emulate.py",
        "graph_0/forward_5_fuse_micro.py",
        "graph_0/forward_6_schedule.py",
        "graph_0/forward_7_addend.py",
        "graph_0/joint_0_traced.py",
        "graph_0/joint_1_linear.py",
        "graph_0/joint_2_grouped_mm.py",
        "graph_0/joint_3_hoist.py",
        "graph_0/joint_4_pair_amax.py",
        "graph_1/forward_0_post_grad.py",
        "graph_1/forward_1_fuse_columns.py",
        "graph_1/forward_2_fuse.py",
        "graph_1/forward_3_fuse_whole.py",
        "graph_1/forward_4_emulate.py",
        "graph_1/forward_5_fuse_micro.py",
        "graph_1/forward_6_schedule.py",
        "graph_1/forward_7_addend.py",
        "graph_1/joint_0_traced.py",
        "graph_1/joint_1_linear.py",
        "graph_1/joint_2_grouped_mm.py",
        "graph_1/joint_3_hoist.py",
        "graph_1/joint_4_pair_amax.py",
        "graph_1/joint_5_deduplicate.py",
    ]
    grads = [f"torch.bfloat16 {list(p.shape)}" for p in (*model.parameters(), x)]
    for name in ("backward", "backward_2_fuse", "joint_0_traced", "joint_1_linear"):
        shapes = [line.partition(" ")[2] for line in printed[f"graph_0/{name}.py"]]
        assert sorted(shapes[-len(grads) :]) == sorted(grads)
    assert "# w1.weight" not in (text := (tmp_path / "graph_0" / "forward.py").read_text())
    assert "# bf16[128, 64]  w1.weight" in text
    assert "\n    # w1\n" in text
    assert "    # w2, backward\n" in (tmp_path / "graph_0" / "backward.py").read_text()


def test_a_file_runs_by_itself(tmp_path):
    linear(tmp_path)
    file = tmp_path / "graph_0" / "joint_1_linear.py"
    run = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(lpcompile.__file__).parents[1])},
    )
    assert run.stdout.splitlines() == [
        "mm torch.bfloat16 [32, 48]",
        "mm_2 torch.bfloat16 [32, 64]",
        "permute_4 torch.bfloat16 [48, 64]",
    ]


def test_a_symbolic_size_is_at_its_hint(tmp_path):
    x, w = operands()
    torch._dynamo.mark_dynamic(x, 0)
    with lpcompile.dump(tmp_path):
        compiled(project)(x, w).sum().backward()
    assert "bfloat16  [s" in (tmp_path / "graph_0" / "saved.txt").read_text()
    for file in graphs(tmp_path):
        expected = "[32, 48]" if file.stem.startswith("forward") else "[48, 64]"
        assert f"torch.bfloat16 {expected}" in "\n".join(runs(file))
    assert "mm torch.bfloat16 [32, 48]" in runs(tmp_path / "graph_0" / "forward.py")


def test_what_higher_order_ops_call_is_written_with_the_graph(tmp_path):
    x, w = operands()

    def f(x, w):
        return torch.cond(x.sum() > 0, lambda x: F.linear(x, w), lambda x: F.linear(x, w) + 1, (x,))

    with lpcompile.dump(tmp_path):
        compiled(f)(x, w).sum().backward()
    files = graphs(tmp_path)
    assert {f.stem.partition("_")[0] for f in files} >= {"joint", "subgraph0", "subgraph1"}
    for file in files:
        assert runs(file)


def test_what_is_saved_adds_up_to_what_is_reported(tmp_path):
    x, w = operands()
    w2 = nn.Parameter(torch.randn(16, 48).bfloat16())
    with observe() as compiles, lpcompile.dump(tmp_path):
        compiled(lambda x: F.linear(F.linear(x, w), w2))(x).sum().backward()
    text = (tmp_path / "graph_0" / "saved.txt").read_text()
    totals = [int(t.split()[1].replace(",", "")) for t in text.splitlines() if "activations:" in t]
    # x, with the maxima of its columns, and h[32, 48]: narrowed, its values and its scales along
    # the rows; else in bf16.
    assert totals == [32 * 64 * 2 + 64 * 4 + 32 * 48 + 48 * 4, 32 * 64 * 2 + 32 * 48 * 2]
    assert compiles[0].saved_bytes == (totals[1], totals[0])


def test_the_option_writes_what_the_context_writes(tmp_path):
    linear(tmp_path / "context")
    torch._dynamo.reset()
    x, w = operands()
    compiled(project, dump=tmp_path / "option")(x, w).sum().backward()
    context, option = (
        {f.name: f.read_text() for f in (tmp_path / name / "graph_0").glob("joint*")}
        for name in ("context", "option")
    )
    assert context == option


def test_a_second_compile_keeps_the_first(tmp_path):
    linear(tmp_path)
    first = (tmp_path / "graph_0" / "index.txt").read_text()
    torch._dynamo.reset()
    linear(tmp_path)
    assert (tmp_path / "graph_0" / "index.txt").read_text() == first
    assert (tmp_path / "graph_1" / "gemms.txt").exists()


def test_nothing_to_write_is_a_warning(tmp_path):
    x, w = operands()
    function = compiled(project)
    function(x, w)
    with pytest.warns(LowPrecisionWarning, match="reset"), lpcompile.dump(tmp_path):
        function(x, w)


def test_a_dump_is_a_path():
    with pytest.raises(OptionError, match="path of a folder, got True"):
        lpcompile.Options(dump=True)


def test_the_bytecode_calls_the_compiled_graph(tmp_path):
    pytest.importorskip("depyf")
    with lpcompile.dump(tmp_path):
        compiled(project)(*operands())
    text = (tmp_path / "graph_0" / "bytecode.py").read_text()
    assert "__compiled_fn_" in text
    compile(text, "bytecode.py", "exec")


def test_inductors_output_is_written_and_no_cache_serves_it(tmp_path):
    x, w = operands()
    caches = []
    function = compiled(project, codegen="inductor", joint_custom_post_pass=lambda graph: (
        caches.append(inductor_config.force_disable_caches)
    ))  # fmt: skip
    with lpcompile.dump(tmp_path):
        function(x, w).sum().backward()
    assert caches == [True]
    for part, count in (("forward", 1), ("backward", 2)):
        text = (tmp_path / "graph_0" / f"inductor_{part}.py").read_text()
        assert text.count("torch.ops.lpcompile.scaled_mm.default(") == count


def test_a_fake_input_is_as_large_as_the_real_one(tmp_path):
    given, _ = linear(tmp_path)
    module = runpy.run_path(str(tmp_path / "graph_0" / "joint_0_traced.py"))
    with FakeTensorMode():
        fakes = module["inputs"]().values()
    assert [(f.shape, f.stride(), f.dtype) for f in fakes] == [
        (t.shape, t.stride(), t.dtype) for t in given
    ]
