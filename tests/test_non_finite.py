"""A diverged step shows and can be skipped; two runs, and a resumed one, are equal to the bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpcompile.recipes import RECIPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DIM, ROWS = 64, 96
LAYERS = ("first", "second")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(DIM, DIM, bias=False) for _ in LAYERS)
        self.norm = nn.RMSNorm(DIM)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.norm(self.second(F.silu(self.first(x))))


def start(recipe, device):
    """A compiled model that trains, and its optimizer."""
    torch._dynamo.reset()
    model = compile(Model().to(device), recipe)
    return model, adamw(model)


def compile(model, recipe):
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager"}
    model.compile(backend="lowprec", options=options, fullgraph=True)
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(i, device):
    """x and dY of the i-th step."""
    generator = torch.Generator().manual_seed(100 + i)
    x, dy = torch.randn(2, ROWS, DIM, generator=generator).bfloat16().to(device)
    return x, dy


def train(model, optimizer, x, dy):
    """One step, skipped where the gradient is not finite; returns its norm."""
    optimizer.zero_grad()
    model(x).backward(dy)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if torch.isfinite(norm):
        optimizer.step()
    return norm


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(a, b):
    """The names of tensors whose bits differ."""
    return [n for n in a if not torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_one_bad_gradient_shows_in_every_layer_and_skipping_it_leaves_no_trace(
    recipe, device, value
):
    model, optimizer = start(recipe, device)
    train(model, optimizer, *batch(0, device))
    before, clean = weights(model), copy.deepcopy(model)  # which takes no bad step
    twin = adamw(clean)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compile(clean, recipe)

    x, dy = batch(1, device)
    dy[17, 5] = value
    norm = train(model, optimizer, x, dy)
    assert not torch.isfinite(norm)
    for layer in LAYERS:
        assert not model.get_submodule(layer).weight.grad.isfinite().all(), layer
    assert differing(before, weights(model)) == []

    norms = []
    for each in ((model, optimizer), (clean, twin)):
        torch.manual_seed(2)  # of stochastic rounding
        norms.append(train(*each, *batch(2, device)))
    assert torch.isfinite(norms[0])
    assert torch.equal(*norms)
    assert differing(weights(model), weights(clean)) == []
    assert differing(before, weights(model)) != []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_activation_shows_in_its_row_alone_and_in_the_gradients(recipe, device):
    """A row is a token: where a scale reaches over the whole tensor all share it, and all show."""
    model, _ = start(recipe, device)
    x, dy = batch(0, device)
    x[17, 5] = torch.inf
    y = model(x)
    bad = (~y.isfinite()).any(1)
    gemm = RECIPES[recipe].fprop
    whole = gemm is not None and (gemm.lhs.along == "tensor" or gemm.lhs.fmt.tensor_scale)
    assert bad.nonzero().flatten().tolist() == (list(range(ROWS)) if whole else [17])
    y.backward(dy)
    assert not torch.isfinite(nn.utils.get_total_norm([p.grad for p in model.parameters()]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_runs_and_a_resumed_one_are_equal_to_the_bit(recipe, device, tmp_path):
    def run(steps, load=None):
        model, optimizer = start(recipe, device)
        if load is not None:
            saved = torch.load(load)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            set_random_state(saved["random"])
        norms = torch.stack([train(model, optimizer, *batch(i, device)) for i in steps])
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_state(),
        }
        torch.save(saved, tmp_path / f"{steps[-1]}.pt")
        return {"norms": norms[-2:], **weights(model)}

    whole, again = run(range(4)), run(range(4))
    assert differing(whole, again) == []
    run(range(2))
    assert differing(whole, run(range(2, 4), load=tmp_path / "1.pt")) == []
    assert differing(whole, run(range(2, 4))) != []


def random_state():
    """Of the generators that stochastic rounding draws its seed from."""
    return torch.get_rng_state(), *(torch.cuda.get_rng_state_all())


def set_random_state(state):
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])
