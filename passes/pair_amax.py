"""Take both maxima that NVFP4 scales the tokens of experts by in one read of them.

    amax_tensor_grouped(x, offs), amax_group(x, offs, signs)  ->  amax_group_both(x, offs, signs)

The first scales the copy that is contracted along channels, the second, after the transform, that
along tokens, group by group. Of a gradient both are the backward's. Of X the forward takes the
first, and now the second too, E numbers that are saved, which the backward took by reading X again;
in a checkpointed region, where what the forward makes is not to be saved, it still does.

Before the cut, which decides what is saved. 65536 x 7168 tokens are read in 0.21 ms (one H200).
"""

from collections import defaultdict
from typing import Any

from torch import fx

from lpcompile import ops
from lpcompile.graph import calls, emit, meta_of, replace


def run(graph: fx.Graph) -> int:
    """Merge what one read serves, and return how many reads fell away."""
    groups: dict[tuple[Any, Any], list[fx.Node]] = defaultdict(list)
    tokens: dict[tuple[Any, Any], list[fx.Node]] = defaultdict(list)
    for node in calls(graph, {ops.amax_tensor_grouped.op, ops.amax_group.op}):
        x, offs, *signs = node.args
        known = not signs or signs == [ops.hadamard.SIGNS]
        if known and not node.kwargs and "recompute" not in node.meta:
            (groups if signs else tokens)[x, offs].append(node)
    both = [of for of in groups if of in tokens]
    return sum(_merge(groups[of], tokens[of]) for of in both)


def _merge(groups: list[fx.Node], tokens: list[fx.Node]) -> int:
    first = min(groups[0], tokens[0])
    made = emit(first, _both, *groups[0].args, meta=meta_of(first))
    for part, nodes in zip(made, (groups, tokens), strict=True):
        for node in nodes[1:]:
            node.replace_all_uses_with(part)
            node.graph.erase_node(node)
        replace(nodes[0], part)
    return len(groups) + len(tokens) - 1


def _both(x: Any, offs: Any, signs: int) -> Any:
    made = ops.amax_group_both.op(x, offs, signs)
    return made[0], made[1]
