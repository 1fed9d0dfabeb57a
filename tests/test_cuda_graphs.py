"""Inductor's CUDA graphs over narrowed layers: small ones are bound by the host without them."""

import pytest
import torch
from oracle import FFN, to_nearest

from lpcompile.ops.define import same_bits
from lpcompile.recipes import RECIPES


def steps(recipe, num_steps=4, **options):
    """Output and gradients of the last of a few steps, each on data of its own."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = FFN(128, 256).cuda().bfloat16()
    # Where Inductor times ways to reduce a row, sums are in another order from time to time.
    options = {"recipe": to_nearest(recipe), "rewrite": "all", "deterministic": True, **options}
    model.compile(backend="lowprec", fullgraph=True, options=options)
    for _ in range(num_steps):
        model.zero_grad(set_to_none=True)
        x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        y = model(x)
        y.backward(torch.randn_like(y))
    made = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [t.clone() for t in made]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.is_bf16])
def test_a_replayed_graph_makes_the_same_bits(name):
    plain = steps(RECIPES[name])
    graphs = steps(RECIPES[name], **{"triton.cudagraphs": True})
    assert same_bits(graphs, plain) == ""
    trees = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device())
    assert trees.tree_manager is not None  # graphs were recorded, not skipped
