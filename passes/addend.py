"""Add inside a grouped GEMM: add(a, scaled_grouped_mm(..)) becomes scaled_grouped_mm(.., addend=a).

What two projections of one x give to its gradient is added up: dX of W1 and of W3, in SwiGLU's
experts. The GEMM adds as it stores, to the same bits, while it multiplies the next tile; a kernel
that adds reads both terms and writes their sum (0.27 of 8.1 ms, 64 experts of DeepSeek-V3-16B).

- The GEMM that comes last takes the other term, when nobody else reads its product.
- Only a term that is in memory anyway: pointwise ops fuse with the sum, and stay with it.
- Dense GEMMs are cuBLASLt's, and take none.

The sum is a tensor of its own. Over the term, where that dies, it would be one tensor less at the
GEMM of a gradient of X; but SwiGLU's backward holds more before that, gate, up and dh, and a custom
op that writes to what it reads keeps Inductor from planning memory around it.
"""

from torch import fx

from lpcompile import ops
from lpcompile.graph import alike, aten, base, calls, value
from lpcompile.liveness import is_cheap


def run(graph: fx.Graph) -> int:
    """Give GEMMs their addends, and return how many."""
    count = 0
    for node in calls(graph, {aten.add.Tensor}):
        terms = [t for t in node.args if isinstance(t, fx.Node)]
        if node.kwargs or len(terms) < 2:
            continue
        first, last = sorted(terms)
        if _takes(last, first, node):
            last.update_kwarg("addend", first)
            node.replace_all_uses_with(last)
            graph.erase_node(node)
            count += 1
    return count


def _takes(product: fx.Node, term: fx.Node, total: fx.Node) -> bool:
    """Whether a product can be made with the term in it, in place of the sum."""
    return (
        product.target in (ops.scaled_grouped_mm.op, ops.wide_grouped_mm.op)
        and set(product.users) == {total}
        and term is not product
        and "addend" not in product.kwargs
        and not is_cheap(base(term))
        and alike(value(product), value(total), strides=True)
        and alike(value(product), value(term), strides=True)
    )
