"""Multiply MXFP8 and NVFP4 operands in bf16, where the device has no tensor cores for them:

    scaled_mm(values, scales, ..)  ->  wide_mm(dequantize(values, scales), ..)

The bits are those of ``scaled_mm`` there, which does just that. As nodes, two products that read
one copy dequantize it once; scales are brought into no tiles; and where nobody else reads a copy,
``fuse_micro`` writes what it stands for and no copy. What is saved for the backward stays narrow.

After the cut, so that what is narrowed, and what is saved, is the same on every device.
"""

from typing import Any

import torch
from torch import Tensor, fx

from lpcompile import ops
from lpcompile.graph import call, calls, replace, value
from lpcompile.ops import block_scaled, blocks

Wide = dict[tuple[fx.Node, fx.Node], fx.Node]  # (values, scales) -> what they stand for


def run(graph: fx.Graph) -> int:
    """Rewrite the products that the device emulates, and return how many."""
    count = 0
    wide: Wide = {}
    for node in calls(graph, {ops.scaled_mm.op, ops.scaled_grouped_mm.op}):
        args: Any = node.args
        if value(args[1]).dtype in block_scaled.SCALES and emulates(value(node)):
            count += _rewrite(node, wide)
    return count


def emulates(x: Tensor) -> bool:
    """Whether x is on a GPU that multiplies MXFP8 and NVFP4 operands in bf16.

    A fake tensor may be on one that is not here. CPUs run references, which are no faster so.
    """
    return x.device.type == "cuda" and torch.cuda.is_available() and not blocks.runs_native(x)


def _rewrite(node: fx.Node, wide: Wide) -> bool:
    args: Any = node.args
    a, a_scales, b, b_scales, *rest = args
    if node.target is ops.scaled_grouped_mm.op:
        target, (offs, out_dtype, _, *amaxes) = ops.wide_grouped_mm.op, rest
        if offs is None:  # experts with as many tokens each
            return False
        more = [offs, out_dtype]
    else:
        target, (out_dtype, _, *amaxes) = ops.wide_mm.op, rest
        more = [out_dtype]
    graph = node.graph
    with graph.inserting_before(node):
        operands = []
        for values, scales in ((a, a_scales), (b, b_scales)):
            key = values, scales.args[0] if scales.target is ops.swizzle.op else scales
            if key not in wide:
                wide[key] = call(graph, ops.dequantize.op, *key)
            operands.append(wide[key])
        made = call(graph, target, *operands, *more, *amaxes)
    replace(node, made)
    return True
