"""The examples, run small: what they print and what they compute."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where `python examples/...` finds its neighbours

import corpus  # noqa: E402
import gpt  # noqa: E402
import graphed  # noqa: E402
import training  # noqa: E402

from lpcompile import RECIPES, Rule  # noqa: E402


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text():
    return corpus.load("stdlib")


@pytest.fixture
def plan():
    shape = gpt.Shape(dim=32, num_layers=1, num_heads=2, num_kv_heads=1, hidden=64, context=32)
    return training.Plan(
        shape, batch=4, steps=25, learning_rate=3e-3, device="cpu", codegen="eager", save_every=10
    )


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_text_is_read_once_and_stands_on_one_side(tmp_path):
    files = {f"{i}.py": b"x = %d\n" % (i % 150) for i in range(200)}
    made = corpus.load(str(write(tmp_path / "here", files)))
    sides = [bytes(side.tolist()).split(b"\0") for side in (made.train, made.validation)]
    assert sorted(sides[0] + sides[1]) == sorted({*files.values()})
    assert (made.num_files, made.num_duplicates) == (150, 50)


def test_the_split_does_not_depend_on_names_or_places(tmp_path):
    files = {f"{i}.py": b"x = %d\n" % i for i in range(200)}
    renamed = {f"other{i}.py": b"x = %d\n" % (199 - i) for i in range(200)}
    made, other = (
        corpus.load(str(write(tmp_path / name, given)))
        for name, given in (("here", files), ("there", renamed))
    )
    assert torch.equal(made.train, other.train)
    assert torch.equal(made.validation, other.validation)


def test_every_window_comes_once_before_any_comes_twice():
    windows = corpus.Windows(torch.arange(241).to(torch.uint8), context=8, batch=5, seed=3)
    first = torch.cat([windows[i][0] for i in range(windows.num_batches)])
    assert sorted(first[:, 0].tolist()) == list(range(0, 240, 8))
    assert not torch.equal(windows[windows.num_batches][0], windows[0][0])


def test_a_batch_does_not_depend_on_the_ones_before():
    text = torch.arange(241).to(torch.uint8)
    windows = corpus.Windows(text, context=8, batch=5, seed=3)
    late = [windows[i] for i in range(9)][8]
    at_once = corpus.Windows(text, context=8, batch=5, seed=3)[8]
    assert torch.equal(late[0], at_once[0])
    assert torch.equal(late[0] + 1, late[1])


def test_llama3_8b_has_the_parameters_of_llama3_8b():
    with torch.device("meta"):
        model = gpt.GPT(gpt.LLAMA3_8B)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_rotary_products_depend_on_the_distance_alone():
    shape = gpt.Shape(dim=64, num_layers=1, num_heads=1, num_kv_heads=1, hidden=64, context=12)
    cos, sin = gpt.rotary(shape)
    q, k = (gpt.rotate(torch.randn(64).expand(1, 1, 12, 64), cos, sin)[0, 0] for _ in "qk")
    products = q @ k.t()
    for distance in range(12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_a_token_does_not_see_the_ones_after(plan):
    model = gpt.GPT(plan.shape)
    tokens = torch.randint(256, (1, 32))
    blind = torch.full((1, 32), -100)  # not counted in the loss
    blind[0, 10] = 7
    changed = tokens.clone()
    changed[0, 11:] += 1
    changed %= 256
    assert torch.equal(model(tokens, blind), model(changed, blind))
    assert not torch.equal(model(tokens, blind), model(tokens.flip(1), blind))


def train(variant, plan, text, on_lap=lambda run: None, folder=None, deadline=math.inf):
    torch._dynamo.reset()
    return training.train(variant, plan, text, on_lap, folder, deadline)


FORWARD_BF16 = replace(RECIPES["nvfp4"], fprop=None)  # the rest draws at random
VARIANTS = {
    "bf16": training.Variant("x", None, seed=0),
    "fp8_rowwise": training.Variant("x", "fp8_rowwise", seed=0),
    "a switch in what is resumed": training.Variant("x", "nvfp4", seed=0, ending=FORWARD_BF16),
    "a switch in what was interrupted": training.Variant(
        "x", "nvfp4", seed=0, ending=FORWARD_BF16, ending_share=0.8
    ),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(plan, text, variant, tmp_path):
    plan = replace(plan, validate_every=10)

    def run(**how):
        return train(variant, plan, text, **how)

    whole = run()
    stopped = run(deadline=0, folder=tmp_path)
    resumed = run(folder=tmp_path)
    again = run(folder=tmp_path)
    assert (len(stopped.losses), stopped.is_finished) == (10, False)
    assert (resumed.losses, resumed.validation) == (whole.losses, whole.validation)
    assert (resumed.validations, len(whole.validations)) == (whole.validations, 2)
    assert again == resumed


def test_a_run_that_died_goes_on_from_its_last_checkpoint(plan, text, tmp_path):
    variant = training.Variant("x", None, seed=0)
    died_at, began_at = [], []

    def die(run):
        died_at.append(len(run.losses))
        if len(run.losses) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(variant, plan, text, die, tmp_path)
    resumed = train(variant, plan, text, lambda run: began_at.append(len(run.losses)), tmp_path)
    assert (died_at, began_at) == ([0, 10, 20], [10, 20, 25])
    assert resumed.losses == train(variant, plan, text).losses


def test_a_switch_late_in_a_run_changes_its_end_alone(plan, text):
    fp8 = training.Variant("x", "fp8_rowwise", seed=0)
    ends = replace(fp8, ending=replace(RECIPES["fp8_rowwise"], fprop=None))
    stays, switches = (train(variant, plan, text).losses for variant in (fp8, ends))
    assert stays[:21] == switches[:21]  # 0.85 of 25 steps
    assert stays[21] != switches[21]


def test_a_rule_of_depth_keeps_the_last_blocks(plan, caplog):
    plan = replace(plan, shape=replace(plan.shape, num_layers=8), per_block=True)
    variant = training.Variant("x", "nvfp4", seed=0, rules=(Rule("*", "bf16", last=0.15),))
    model, _ = training.build(plan, variant)
    variant.compile(model, plan)
    batch = torch.randint(256, (4, 32)), torch.randint(256, (4, 32))
    blocks = []
    with caplog.at_level("INFO", logger="lpcompile"):
        for block in model.blocks:
            block.register_forward_hook(lambda *_: blocks.append(len(caplog.records)))
        training.loss_of(model, batch)
    assert [r.message[:40] for r in caplog.records] == [
        "lpcompile: nvfp4: 21 of 21 GEMMs narrowed"[:40],
        "lpcompile: nvfp4: 0 of 21 GEMMs narrowed"[:40],
    ]
    assert blocks == [1] * 6 + [2] * 2  # of 8 blocks, 1.2 count as two


@pytest.mark.gpu
def test_a_graphed_function_takes_new_inputs_and_draws_new_numbers():
    def noisy(x):
        return 2 * x + torch.rand_like(x)

    call = graphed.Graphed(noisy)
    made = [call(torch.full((64,), float(4 * i), device="cuda")) for i in range(6)]
    assert call.graph is not None
    noise = torch.stack([m - 8 * i for i, m in enumerate(made)])
    assert (noise >= 0).all()
    assert (noise <= 1).all()
    assert len({tuple(n.tolist()) for n in noise}) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "fp8_rowwise"])
def test_a_run_of_graphs_equals_one_without(plan, text, recipe, monkeypatch):
    variant, plan = training.Variant("x", recipe, seed=0), replace(plan, device="cuda")
    run = train(variant, plan, text)
    monkeypatch.setattr(graphed.Graphed, "NUM_WARM", 10**9)
    other = train(variant, plan, text)
    # A GPU does not repeat a run bit for bit, and what differs grows. The third step is a graph's.
    assert run.losses[:10] == pytest.approx(other.losses[:10], rel=3e-3)
    assert run.losses[0] - run.losses[9] > 0.3


def test_blocks_that_are_alike_compile_once(plan, caplog):
    plan = replace(plan, shape=replace(plan.shape, num_layers=3), per_block=True)
    variant = training.Variant("x", "fp8_rowwise", seed=0)
    model, _ = training.build(plan, variant)
    variant.compile(model, plan)
    batch = torch.randint(256, (4, 32)), torch.randint(256, (4, 32))
    with caplog.at_level("INFO", logger="lpcompile"):
        training.loss_of(model, batch).backward()
    assert [r.message for r in caplog.records if "GEMMs narrowed" in r.message] == [
        "lpcompile: fp8_rowwise: 21 of 21 GEMMs narrowed (fp8_rowwise 21)"
    ]


def test_a_folder_with_another_plan_is_refused(plan, text, tmp_path):
    variant = training.Variant("x", None, seed=0)
    training.train(variant, plan, text, lambda run: None, tmp_path, deadline=0)
    with pytest.raises(ValueError, match="another plan"):
        training.train(variant, replace(plan, learning_rate=1.0), text, lambda run: None, tmp_path)


PRINTED = [
    "bf16",
    "Y  = mm(X, W.T)",
    "dX = mm(dY, W)",
    "dW = mm(dY.T, X)",
    "fp8_rowwise",
    "Y  = scaled_mm(quantize_fp8_row(X), quantize_fp8_row(W))",
    "GEMMs narrowed",
    "to train on",
    "validation loss",
    "Saved for the backward",
    "emulated on a CPU",
    "A Llama3-8B",
    " us in bf16, ",
    "loss.png",
]


def test_training_in_fp8_follows_bf16(capsys, tmp_path):
    steps = 60
    train_gpt = example("01_train_gpt")
    train_gpt.LLAMA3_8B = replace(gpt.LLAMA3_8B, num_layers=1)
    train_gpt.SIZES["tiny"] = replace(train_gpt.SIZES["tiny"], batch=4)
    runs = train_gpt.main(
        ["--codegen", "eager", "--steps", str(steps), "--device", "cpu", "--out", str(tmp_path)]
    )
    bf16, fp8, other = runs.values()
    for run in runs.values():
        assert len(run.losses) == steps
        assert run.validation < 3.5 < 5 < run.losses[0]  # nats per byte; log(256) is 5.55
    assert fp8.losses != bf16.losses  # or nothing was narrowed
    early = zip(fp8.losses[:10], bf16.losses[:10], strict=True)
    assert max(abs(a / b - 1) for a, b in early) < 0.005  # later, small differences have grown
    assert abs(fp8.validation / bf16.validation - 1) < 0.02
    assert other.losses[0] != bf16.losses[0]
    out = capsys.readouterr().out
    at = [out.find(line) for line in PRINTED]
    assert -1 not in at, PRINTED[at.index(-1)]
    assert at == sorted(at)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipe fp8_rowwise,fp8_tensor", "no recipe 'fp8_tensor': did you mean"),
        ("--steps 0", "--steps is at least 1"),
        ("--minutes 3", "--minutes needs --out"),
    ],
)
def test_a_flag_that_cannot_be_is_named_before_anything_is_trained(flags, message, capsys):
    with pytest.raises(SystemExit):
        example("01_train_gpt").main(flags.split())
    assert message in capsys.readouterr().err
