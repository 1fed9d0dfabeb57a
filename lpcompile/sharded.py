"""A linear of DTensors, computed on what each rank has, as ``nn.Linear`` under tensor parallelism.

    y[..., N] = x[..., K] @ w[N, K].T, for each dimension of the mesh by what w is there

    w            x             y            dx           dw
    Shard(0)     Replicate     Shard(-1)    Partial      Shard(0)      column-parallel
    Shard(1)     Shard(-1)     Partial      Shard(-1)    Shard(1)      row-parallel
    Replicate    Shard(i)      Shard(i)     Shard(i)     Partial       another dimension of x
    Replicate    Replicate     Replicate    Replicate    Replicate

An x that is placed otherwise is brought there first. Scales are those of the local tensors, as in a
compiled graph, where a rank sees its shards alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lpcompile.errors import ShapeError


def linear(x: Tensor, w: DTensor, local: Callable[[Tensor, Tensor], Tensor]) -> DTensor:
    """``local(x, w)`` of the shards, put together: x[..., K], w[N, K] -> y[..., N].

    ShapeError where x is no DTensor, or w is neither sharded nor replicated.
    """
    if not isinstance(x, DTensor):
        raise ShapeError(
            f"w is a DTensor {w.placements} and x a plain tensor: make x one too, as the styles of "
            "torch.distributed.tensor.parallel do"
        )
    last = x.dim() - 1
    rows = [
        _placed(of_w, of_x, last) for of_w, of_x in zip(w.placements, x.placements, strict=True)
    ]
    of_x, of_y, of_dx, of_dw = (list(column) for column in zip(*rows, strict=True))
    x = x.redistribute(placements=of_x)
    y = local(x.to_local(grad_placements=of_dx), w.to_local(grad_placements=of_dw))
    shape = torch.Size((*x.shape[:-1], w.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, w.device_mesh, of_y, run_check=False, shape=shape, stride=stride)


def _placed(w: Placement, x: Placement, last: int) -> tuple[Placement, ...]:
    """How x is to be placed, and how y, dx and dw are, along one dimension of the mesh."""
    if w == Shard(0):
        return Replicate(), Shard(last), Partial(), Shard(0)
    if w == Shard(1):
        return Shard(last), Partial(), Shard(last), Shard(1)
    if w != Replicate():
        raise ShapeError(f"a weight is sharded or replicated, got {w}: redistribute it first")
    if isinstance(x, Shard) and x.dim % (last + 1) != last:
        return x, x, x, Partial()
    return Replicate(), Replicate(), Replicate(), Replicate()
