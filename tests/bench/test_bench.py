"""The benchmark tool from end to end at tiny sizes, and what its numbers mean."""

import json

import pytest
import torch

from lpcompile import ops
from lpcompile.__main__ import main
from lpcompile.bench import (
    fused,
    gemms,
    kernels,
    layers,
    machine,
    models,
    moe,
    report,
    variants,
)
from lpcompile.bench.timing import Timing, interleave
from lpcompile.errors import OptionError, ShapeError
from lpcompile.ops import fused_source, groups, quantize_fp8_whole
from lpcompile.ops.define import same_bits
from lpcompile.recipes import RECIPES

CPU = torch.device("cpu")
TINY = ("--model", "tiny")
EAGER = '{"codegen": "eager", "rewrite": "all"}'


def run(tmp_path, *arguments, device="cpu"):
    """The Results of one command."""
    out = tmp_path / "out.json"
    common = ["--device", device, "--repeats", "2", "--json", str(out)]
    assert main(["bench", *arguments, *common]) == 0
    return report.load([out])


def test_every_op_but_the_gemms_is_measured():
    assert set(kernels.KERNELS) | set(kernels.GEMMS) | set(fused.FUSED) == set(ops.ALL)


@pytest.mark.parametrize("part", ["ffn", "block"])
def test_a_layer_is_measured_in_every_variant(tmp_path, capsys, part):
    arguments = [part, "--model", "tiny", "--options", EAGER, "--no-peers"]
    (result,) = run(tmp_path, *arguments)
    assert [row["variant"] for row in result.rows] == ["bf16", "fp8_rowwise", "fp8_tensorwise"]
    bf16, *narrow = result.rows
    assert bf16["speedup"] == 1
    assert bf16["dw error"] == 0
    for row in narrow:
        assert row["speedup"] == pytest.approx(bf16["ms"] / row["ms"])
        assert 0.01 < row["dw error"] < 0.1
    assert machine.CPU_NOTE in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "model", "tokens"),
    [
        ("experts", "tiny", models.EXPERTS["tiny"].rows),
        ("ffn", "tiny-moe", moe.MOES["tiny-moe"].tokens),
        ("block", "tiny-moe", moe.MOES["tiny-moe"].tokens),
    ],
)
def test_experts_are_measured_in_groups_of_both_kinds(tmp_path, part, model, tokens):
    arguments = ["--model", model, "--recipes", "fp8_rowwise", "--options", EAGER, "--no-peers"]
    (result,) = run(tmp_path, part, *arguments, "--ragged")
    seen = [(row["model"], row["variant"], row["tokens"]) for row in result.rows]
    ways = [(name, how) for name in (model, f"{model} ragged") for how in ("bf16", "fp8_rowwise")]
    assert seen == [(*way, tokens) for way in ways]
    for bf16, narrow in (result.rows[:2], result.rows[2:]):
        assert bf16["dw error"] == 0
        assert 0.01 < narrow["dw error"] < 0.1


def test_a_peer_that_would_end_the_process_is_left_out():
    peer = variants.Variant("theirs", {}, is_peer=True)
    even, ragged = (
        models.experts_layer(models.EXPERTS["tiny"], ragged=ragged) for ragged in (False, True)
    )
    assert [peer.runs(layer) for layer in (even, ragged)] == [True, False]
    assert variants.Variant("ours", {}).runs(ragged)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_variant_routes_alike_to_groups_of_the_sizes_compared(ragged):
    model = moe.MOES["tiny-moe"]
    layer = moe.moe_layer("block", model, ragged=ragged)
    expected = model.experts.offsets(ragged=ragged)
    for scale in (1, 30):  # other scores
        module = models.built(layer, CPU)
        module.moe.gate.weight.data.mul_(scale)
        seen = []
        module.moe.experts.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args))
        module(*layer.inputs(CPU))
        ((rows, offs),) = seen
        assert torch.equal(offs, expected)
        assert rows.shape == (model.tokens * model.top_k, model.dim)


def test_the_choice_among_tokens_is_by_the_router_and_weighs_its_experts():
    """Against every expert applied to every token, with no bias: what the block is to compute."""
    model = moe.MOES["tiny-moe"]
    layer = moe.moe_layer("ffn", model, ragged=True)
    module = models.built(layer, CPU).float()
    module.experts.to(torch.bfloat16)
    x, bias = layer.inputs(CPU)
    x = x.detach().float().bfloat16().float()
    h = module.norm(x).flatten(0, 1)
    scores = module.gate(h).softmax(-1)
    top = scores.topk(model.top_k)
    e = module.experts
    each = [
        torch.nn.functional.silu(h @ w1.float().t()) * (h @ w3.float().t()) @ w2.float().t()
        for w1, w3, w2 in zip(e.w1, e.w3, e.w2, strict=True)
    ]
    weights = torch.zeros_like(scores).scatter(1, top.indices, top.values)
    routed = torch.einsum("te,etd->td", weights, torch.stack(each))
    expected = x + (routed + module.shared(h)).view_as(x)
    module = module.to(torch.bfloat16)
    made = module(x.bfloat16(), torch.zeros_like(bias))
    assert (made - expected).norm() < 0.02 * expected.norm()


def test_gemms_are_those_of_the_model_in_bf16_and_every_kind(tmp_path):
    (result,) = run(tmp_path, "gemm", "--model", "tiny")
    tiny = models.LLAMAS["tiny"]
    measured = {(r["product"], r["N"], r["K"]) for r in result.rows if r["recipe"] == "bf16"}
    assert measured == {
        (product, linear.n, linear.k)
        for product in ("fprop", "dgrad", "wgrad")
        for linear in models.linears(tiny, "block")
    }
    # A recipe that multiplies nothing which another does not (no wgrad, another rounding) is left.
    names = {row["recipe"] for row in result.rows}
    assert names == set(RECIPES) - {"fp8_rowwise_wgrad_bf16", "mxfp8_wgrad_bf16"}
    for is_bf16 in (True, False):
        shares = [r["share"] for r in result.rows if (r["recipe"] == "bf16") == is_bf16]
        assert max(shares) == 1


def test_grouped_gemms_are_those_of_the_experts(tmp_path):
    arguments = ["--model", "tiny", "--experts", "tiny", "--recipes", "fp8_rowwise"]
    (result,) = run(tmp_path, "gemm", *arguments)
    tiny = models.EXPERTS["tiny"]
    grouped = [row for row in result.rows if row["groups"] == tiny.num_experts]
    assert len(grouped) == 2 * 2 * 3  # bf16 and FP8, both ways round, every product
    assert {(r["M"], r["N"], r["K"]) for r in grouped} == {
        (tiny.rows, tiny.hidden, tiny.dim),
        (tiny.rows, tiny.dim, tiny.hidden),
    }


@pytest.mark.parametrize("model", ["LLAMAS", "EXPERTS"])
def test_what_is_timed_as_a_gemm_is_that_product(model):
    tiny = getattr(models, model)["tiny"]
    for case in gemms.cases([tiny], ["fp8_rowwise"]):
        lhs, rhs, *offs = gemms._operands(case, CPU)
        made = gemms.multiplier(case, lhs, rhs, *offs)().double()
        lhs, rhs = lhs.double(), rhs.double()
        if not offs:
            expected = product_of(case.product, lhs, rhs)
            assert made.shape == expected.shape
            assert (made - expected).norm() < 0.06 * expected.norm()
        for e, rows in enumerate(groups.slices(*offs) if offs else ()):
            across = case.product == "wgrad"
            expected = product_of(case.product, lhs[rows], rhs[rows] if across else rhs[e])
            mine = made[e] if across else made[rows]
            assert mine.shape == expected.shape
            assert (mine - expected).norm() < 0.06 * expected.norm()


def product_of(product, lhs, rhs):
    return {
        "fprop": lambda: lhs @ rhs.t(),
        "dgrad": lambda: lhs @ rhs,
        "wgrad": lambda: lhs.t() @ rhs,
    }[product]()


def test_kernels_are_charged_for_the_bytes_of_their_tensors(tmp_path):
    result = run(tmp_path, "kernels", "--model", "tiny", "--parts", "ops")[0]
    tokens, dim = models.LLAMAS["tiny"].tokens, models.LLAMAS["tiny"].dim
    row = next(r for r in result.rows if (r["kernel"], r["of"]) == ("quantize_fp8_row", "tiny x"))
    moved = 3 * tokens * dim + 4 * tokens
    assert row["TB/s"] * 1e12 * row["us"] * 1e-6 == pytest.approx(moved)
    measured = {r["kernel"].partition(" (")[0] for r in result.rows}
    ops_alone = {*kernels.KERNELS, *(op for op, *_ in kernels.MORE)}
    assert measured == {"copy", *(kernels.name_of(op) for op in ops_alone)}


FUSED = {  # layer, and what of it is quantized as SiLU*mul makes it
    "ffn": (models.llama_layer("ffn", models.LLAMAS["tiny"]), models.LLAMAS["tiny"].hidden),
    "experts": (
        models.experts_layer(models.EXPERTS["tiny"], ragged=True),
        models.EXPERTS["tiny"].hidden,
    ),
}


@pytest.mark.parametrize(("layer", "hidden"), FUSED.values(), ids=FUSED)
def test_what_the_passes_fuse_is_called_with_what_a_layer_gives_it(layer, hidden):
    calls = fused.calls(layer, "fp8_rowwise", torch.device("cpu"))
    h = ("fused_quantize_row: row n of 2 inputs", layer.tokens, hidden)
    assert h in [call[:3] for call in calls]
    casts = [call.tensors for call in calls if call.name.startswith("fused_cast:")]
    assert len(casts) > 1
    for inputs, amaxes, program, forms, *offs in casts:
        wants = [fused_source.parse_form(form).amax for form in forms]
        made = ops.fused_amax.reference(inputs, program, wants, *offs)
        assert same_bits(amaxes, made) == ""


def test_a_whole_model_trains_in_every_variant(tmp_path):
    arguments = ["model", "--model", "tiny", "--options", EAGER, "--no-peers", "--passes", "1", "2"]
    (result,) = run(tmp_path, *arguments)
    assert [(r["variant"], r["passes a step"]) for r in result.rows] == [
        (variant, num) for num in (1, 2) for variant in ("bf16", "fp8_rowwise", "fp8_tensorwise")
    ]
    for row in result.rows:
        assert row["tokens/s"] == pytest.approx(row["tokens"] / (row["ms a pass"] * 1e-3))


def test_a_variant_that_fails_leaves_the_others_their_numbers():
    def broken(module):
        raise ValueError("no such recipe")

    chosen = variants.choose([], {"codegen": "eager"}, max_autotune=False, peers=())
    ours = variants.Variant("ours", {}, convert=broken)
    peer = variants.Variant("theirs", {}, convert=broken, is_peer=True)
    layer = models.llama_layer("ffn", models.LLAMAS["tiny"])
    rows = layers.compare(layer, [*chosen, peer], CPU, 2)
    assert rows[0]["ms"] > 0
    assert rows[1]["peer failed"] == "ValueError: no such recipe"
    assert not report.Result("", "", {}, rows).failed
    rows = layers.compare(layer, [*chosen, ours], CPU, 2)
    assert report.Result("", "", {}, rows).failed


def test_interleaving_runs_each_as_often_and_starts_each_round_elsewhere():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(functions, CPU, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {len(t.samples) for t in timings.values()} == {4}


def test_a_timing_is_a_median_with_its_spread():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.ms == 3.0
    assert timing.spread == pytest.approx((61.6 - 1.4) / 3)


def test_a_prediction_is_near_what_was_measured():
    """In docs/benchmarks.md. What is merged counts as such, which is a fifth of some."""
    ffn = models.llama_layer("ffn", models.LLAMAS["llama3-8b"])
    experts = models.experts_layer(models.EXPERTS["deepseek-v3-16b"], ragged=False)
    tiny = models.llama_layer("ffn", models.LLAMAS["tiny"])
    bf16, fp8, mxfp8 = variants.choose(["fp8_rowwise", "mxfp8"], {}, max_autotune=False, peers=())
    assert layers.predicted(ffn, fp8, 26.8) == pytest.approx(1.67, rel=0.1)
    assert layers.predicted(experts, fp8, 9.9) == pytest.approx(1.3, rel=0.1)
    assert layers.predicted(ffn, mxfp8, 23.8) == pytest.approx(0.92, rel=0.1)
    assert layers.predicted(tiny, fp8, 1.0) == 1.0
    assert layers.predicted(ffn, bf16, 26.8) is None


def test_weights_that_l2_holds_are_read_once_for_their_maxima(monkeypatch):
    layer = models.experts_layer(models.EXPERTS["deepseek-v3-16b"], ragged=False)
    (_, fp8) = variants.choose(["fp8_tensorwise"], {}, max_autotune=False, peers=())
    before = layers.predicted(layer, fp8, 9.9)
    monkeypatch.setattr(quantize_fp8_whole, "LARGEST", 0)
    assert layers.predicted(layer, fp8, 9.9) < 0.98 * before


def test_groups_differ_and_fill_the_rows():
    for config in models.EXPERTS.values():
        for ragged in (False, True):
            offs = config.offsets(ragged=ragged)
            sizes = offs.diff(prepend=offs.new_zeros(1))
            assert len(sizes) == config.num_experts
            assert offs[-1] == config.rows
            assert sizes.min() > 0
            assert sizes.unique().numel() > 1
            assert bool((sizes % 16 == 0).all()) is not ragged


def test_a_shard_is_a_rank_s_part_of_every_linear():
    whole, shard = models.LLAMAS["llama3-8b"], models.LLAMAS["llama3-8b"].shard(8)
    size = sum(linear.n * linear.k for linear in models.linears(whole, "block"))
    assert sum(linear.n * linear.k for linear in models.linears(shard, "block")) == size / 8
    with pytest.raises(ShapeError, match="3 ranks"):
        whole.shard(3)


@pytest.mark.parametrize("part", ["ffn", "block"])
def test_linears_are_those_of_the_module(part):
    model = models.LLAMAS["tiny"]
    named = models.built(models.llama_layer(part, model), CPU).parameters()
    weights = [tuple(w.shape) for w in named if w.dim() > 1]
    assert sorted(weights) == sorted((n, k) for _, n, k in models.linears(model, part))


def test_a_page_holds_every_table_with_its_command(tmp_path, capsys):
    rows = [{"variant": "bf16", "ms": 1.0}, {"variant": "a|b", "ms": None, "speedup": 1.234}]
    result = report.Result("ffn", "python -m lpcompile bench ffn", {"device": "X"}, rows, ["note"])
    path = tmp_path / "one.json"
    report.save([result], path)
    assert json.loads(path.read_text())[0]["rows"] == rows
    assert main(["bench", "report", str(path), str(path)]) == 0
    page = capsys.readouterr().out
    assert page.count("`python -m lpcompile bench ffn`") == 2
    assert "| variant | ms | speedup |\n| --- | --- | --- |\n| bf16 | 1.000 | - |\n" in page
    assert "| a/b | - | 1.23x |" in page


def test_a_rule_for_another_layer_costs_the_prediction_alone(tmp_path):
    options = '{"codegen": "eager", "rewrite": "all", "rules": [["attention", "bf16"]]}'
    arguments = ("--no-peers", "--recipes", "fp8_rowwise", "--options", options)
    (result,) = run(tmp_path, "ffn", *TINY, *arguments)
    assert [row["predicted speedup"] for row in result.rows] == [None, None]
    assert result.rows[1]["speedup"] > 0


def test_a_run_that_is_ended_early_has_saved_what_it_measured(tmp_path, monkeypatch):
    compare = layers.compare

    def ended(layer, *args):
        if layer.tokens == 64:
            raise KeyboardInterrupt
        return compare(layer, *args)

    monkeypatch.setattr(layers, "compare", ended)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "ffn", *TINY, "--tokens", "32", "64", "--recipes", "--options", EAGER)
    (result,) = report.load([tmp_path / "out.json"])
    assert [row["tokens"] for row in result.rows] == [32]


def test_a_wrong_argument_is_one_sentence_and_no_traceback(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2
    assert "holds no benchmark results" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["bench", "report", str(tmp_path / "other.json")]) == 2
    assert "holds no benchmark results (a dict)" in capsys.readouterr().err
    for option in ("--tokens", "--tp"):
        with pytest.raises(SystemExit):
            main(["bench", "ffn", option, "0"])
        assert "a number above 0, got '0'" in capsys.readouterr().err
    assert main(["bench", "ffn", "--device", "cpu", "--json", str(tmp_path / "no" / "a")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["bench", "ffn", "--device", "cpu", "--recipes", "fp8_rowise"]) == 2
    assert "did you mean 'fp8_rowwise'" in capsys.readouterr().err
    for wrong, said in (("profile --part experts --model llama3-8b", "no such part"),
                        ("block --model tiny-moe --tp 2", "leave --tp out"),
                        ("ffn --cuda-graphs", "needs a GPU")):  # fmt: skip
        assert main(["bench", *wrong.split(), "--device", "cpu", "--no-peers"]) == 2
        assert said in capsys.readouterr().err


def test_every_variant_is_asked_for_cuda_graphs():
    chosen = variants.choose(
        ["fp8_rowwise"], {}, max_autotune=True, cuda_graphs=True, peers=variants.TORCHAO
    )
    assert [v.name for v in chosen][:3] == [
        f"{name}, CUDA graphs" for name in ("bf16", "bf16 max-autotune", "fp8_rowwise")
    ]
    assert all(v.compile["options"]["triton.cudagraphs"] for v in chosen)
    assert chosen[1].compile["options"]["max_autotune_gemm"]
    with pytest.raises(OptionError, match="leave one out"):
        variants.choose([], {"codegen": "eager"}, max_autotune=False, cuda_graphs=True, peers=())


FORCED = ("--recipes", "fp8_rowwise", "--no-peers", "--options", '{"rewrite": "all"}')


@pytest.mark.gpu
def test_the_tool_measures_cuda_graphs(tmp_path):
    given = *TINY, *FORCED, "--cuda-graphs"
    bf16, narrow = run(tmp_path, "ffn", *given, device="cuda")[0].rows
    assert narrow["variant"] == "fp8_rowwise, CUDA graphs"
    assert bf16["peak GiB"] is narrow["peak GiB"] is None
    assert 0.01 < narrow["dw error"] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["ffn", "block"])
def test_a_layer_has_its_memory_and_errors_on_a_gpu(part, tmp_path):
    bf16, narrow = run(tmp_path, part, *TINY, *FORCED, device="cuda")[0].rows
    assert bf16["peak GiB"] > 0
    assert narrow["compile s"] > 0
    assert 0.01 < narrow["dw error"] < 0.1


@pytest.mark.gpu
def test_a_profile_says_which_kernel_is_what_on_a_gpu(tmp_path):
    summary, _ = run(tmp_path, "profile", *TINY, *FORCED, device="cuda")
    count = {(r["variant"], r["kind"]): r["kernels"] for r in summary.rows}
    num_gemms = 3 * len(models.linears(models.LLAMAS["tiny"], "block"))
    for variant in ("bf16", "fp8_rowwise"):
        assert count[variant, "GEMM"] >= num_gemms
        assert count[variant, "attention"] >= 2
    assert count["fp8_rowwise", "quantize"] + count["fp8_rowwise", "fused"] > num_gemms


@pytest.mark.gpu
def test_every_kernel_is_timed_on_a_gpu(tmp_path):
    (result,) = run(tmp_path, "kernels", *TINY, device="cuda")
    names = {r["kernel"] for r in result.rows}
    assert names >= {kernels.name_of(op) for op in kernels.KERNELS}
    assert {name.partition(":")[0] for name in names} >= {kernels.name_of(op) for op in fused.FUSED}
    assert result.machine["capability"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "arguments",
    [("gemm",), ("model", *FORCED, "--passes", "1"), ("experts", "--ragged", *FORCED)],
    ids=lambda arguments: arguments[0],
)
def test_what_else_is_measured_runs_on_a_gpu(arguments, tmp_path):
    (result,) = run(tmp_path, *arguments, *TINY, device="cuda")
    assert result.rows


@pytest.mark.gpu
def test_a_block_of_experts_has_its_errors_on_a_gpu(tmp_path):
    arguments = ("block", "--ragged", "--model", "tiny-moe", *FORCED)
    (result,) = run(tmp_path, *arguments, device="cuda")
    assert all(0.01 < row["dw error"] < 0.1 for row in result.rows[1::2])
