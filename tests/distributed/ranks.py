"""What the two processes share, whatever they compute: a step, and how tests read what was seen."""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

WORLD = 2
# Of the relative difference to one process, per column of a weight's gradient: what the rounding
# of the format makes of other scales. e5m2 is twice as coarse as e4m3, e2m1 four times, and draws.
BOUNDS = dict(fp8_rowwise=0.1, fp8_tensorwise=0.3, fp8_blockwise=0.1, mxfp8=0.1, nvfp4=0.6)


def step(model, x, target):
    y = model(x)
    y = y.full_tensor() if isinstance(y, DTensor) else y
    loss = F.mse_loss(y.float(), target.float())
    loss.backward()
    return loss.detach()


def wholes(tensors):
    """Copies on the CPU of named tensors, of which other ranks may have parts."""
    gathered = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors}
    return {n: t.detach().clone().cpu() for n, t in gathered.items()}


def gradients(model):
    return wholes((n, p.grad) for n, p in model.named_parameters())


def of_columns(multiply, linear, x):
    """What ColwiseParallel computes, in one process: a GEMM, and its scales, for each shard."""
    return torch.cat([multiply(x, w) for w in linear.weight.chunk(WORLD)], -1)


def of_rows(multiply, linear, x):
    """What RowwiseParallel computes, in one process."""
    shards = zip(x.chunk(WORLD, -1), linear.weight.chunk(WORLD, 1), strict=True)
    return sum(multiply(x, w) for x, w in shards)


def far_from(expected, made, bound):
    """The gradients with a column that is off by more, and by how much.

    Of an expert's weight, each for itself; a vector is one column.
    """
    far = {}
    for name, gradient in made.items():
        e, g = (
            t.double().reshape(t.shape if t.dim() > 1 else (-1, 1))
            for t in (expected[name], gradient)
        )
        columns = (g - e).norm(dim=-2) / e.norm(dim=-2)
        if not columns.max() <= bound:
            far[name] = columns.max().item()
    return far


def results(world, name):
    """What each rank saw of a job."""
    paths = [world[1] / f"{name} {rank}.pt" for rank in range(WORLD)]
    made = [torch.load(path, weights_only=False) for path in paths]  # a row has an Estimate
    errors = [m["error"] for m in made if "error" in m]
    assert not errors, errors[0]
    return made
