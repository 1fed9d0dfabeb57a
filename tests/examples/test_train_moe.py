"""The example of a mixture of experts, run small: what it computes and what it prints."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where `python examples/...` finds its neighbours

import gpt  # noqa: E402
import moe  # noqa: E402
import training  # noqa: E402

SHAPE = moe.MoEShape(
    dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden=48, context=32,
    num_experts=4, top_k=2, expert_hidden=48,
)  # fmt: skip


@pytest.fixture
def layer():
    made = moe.MoE(SHAPE)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def test_a_layer_is_the_weighted_sum_of_the_experts_a_token_chose(layer):
    x = torch.randn(2, 12, SHAPE.dim)
    h = x.flatten(0, 1).bfloat16().float()
    top = layer.gate(h).softmax(-1).topk(SHAPE.top_k)
    experts = layer.experts
    each = [
        torch.nn.functional.silu(h @ w1.t()) * (h @ w3.t()) @ w2.t()
        for w1, w3, w2 in zip(experts.w1, experts.w3, experts.w2, strict=True)
    ]
    weights = torch.zeros(len(h), SHAPE.num_experts).scatter(1, top.indices, top.values)
    expected = torch.einsum("te,etd->td", weights, torch.stack(each)) + layer.shared(h)
    with torch.autocast("cpu", torch.bfloat16):
        made, _ = layer(x)
    assert (made.flatten(0, 1) - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(layer.load, top.indices.flatten().bincount(minlength=SHAPE.num_experts))


def test_unevenness_is_one_when_even_and_its_gradient_takes_from_the_crowded(layer):
    x = torch.randn(2, 64, SHAPE.dim)

    def unevenness():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)[1]

    layer.gate.weight.data.zero_()
    assert unevenness().item() == pytest.approx(1)
    layer.gate.weight.data[:, 0] = torch.tensor([2.0, 1, -1, -2])
    x[..., 0].abs_()
    crowded = unevenness()
    assert crowded > 1.2
    crowded.backward()
    assert layer.gate.weight.grad[0, 0] > 0 > layer.gate.weight.grad[3, 0]
    layer.gate.weight.data.sub_(layer.gate.weight.grad)
    assert unevenness() < crowded


def test_the_balancing_loss_moves_routers_and_not_the_loss():
    losses, gates = [], []
    tokens = torch.randint(256, (4, 32))
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        model = replace(SHAPE, balance=balance).build()
        loss = training.loss_of(model, (tokens, tokens.roll(-1, 1)))
        loss.backward()
        losses.append(loss.item())
        gates.append(model.blocks[0].ffn.gate.weight.grad)
    assert losses[0] == losses[1]
    assert not torch.equal(*gates)


def test_a_block_is_the_dense_one_but_for_its_experts():
    dense = {n for n, _ in gpt.Block(SHAPE).named_parameters() if not n.startswith("ffn.")}
    assert dense == {
        n for n, _ in moe.MoEBlock(SHAPE).named_parameters() if not n.startswith("ffn.")
    }


PRINTED = [
    "GEMMs narrowed",
    "a router: its output reaches a top-k",
    "to train on",
    "validation loss",
    "Saved for the backward",
    "emulated on a CPU",
    "share of the load",
    "loss.png",
]


def test_training_experts_in_fp8_follows_bf16(capsys, tmp_path):
    steps = 60
    spec = importlib.util.spec_from_file_location("train_moe", EXAMPLES / "03_train_moe.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.SIZES["tiny"] = replace(
        example.SIZES["tiny"], shape=SHAPE, batch=16, learning_rate=5e-3
    )
    runs = example.main(
        ["--codegen", "eager", "--steps", str(steps), "--device", "cpu", "--out", str(tmp_path)]
    )
    bf16, fp8, other = runs.values()
    for run in runs.values():
        assert len(run.losses) == steps
        assert run.validation < 4 < 5 < run.losses[0]  # nats per byte; log(256) is 5.55
        assert [len(load) for load in run.loads] == [SHAPE.num_experts] * SHAPE.num_layers
        tokens = {sum(load) for load in run.loads}
        assert tokens == {16 * 16 * SHAPE.context * SHAPE.top_k}  # of 16 validation batches
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
