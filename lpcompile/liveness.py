"""What the backward of a joint graph holds in bf16 whatever we do.

A narrow copy of X saved for wgrad is smaller than X. But where the backward of another op reads
what X is computed from (SwiGLU's reads gate and up, a norm's reads its input, attention's reads its
output), saving the copy adds memory, and quantizing X in the backward costs no more: the same
kernel that makes the gradients reads those tensors anyway.
"""

from collections.abc import Iterable

import torch
from torch import fx

from lpcompile.flow import Flow
from lpcompile.graph import CASTS, hint, is_view, value


class Held:
    """Answers whether a forward value can be had in the backward from what is held there."""

    def __init__(self, flow: Flow, narrowed: Iterable[fx.Node]) -> None:
        self.flow = flow
        self.narrowed = set(narrowed)  # GEMMs that will not read their operands in bf16
        self._known: dict[fx.Node, bool] = {}

    def __contains__(self, x: fx.Node) -> bool:
        """Whether all that x is computed from, pointwise, is held."""
        return all(self._is_held(leaf) for leaf in self._leaves(x))

    def _leaves(self, x: fx.Node) -> set[fx.Node]:
        """The large activations under x, through pointwise ops and views."""
        size = hint(value(x).numel())
        leaves, seen, stack = set(), {x}, [x]
        while stack:
            node = stack.pop()
            if not is_cheap(node):
                leaves.add(node)
                continue
            for i in node.all_input_nodes:
                if i not in seen and not _is_small(i, size) and i not in self.flow.weights:
                    seen.add(i)
                    stack.append(i)
        return leaves

    def _is_held(self, leaf: fx.Node) -> bool:
        if leaf.op == "placeholder":
            return True
        if leaf not in self._known:
            self._known[leaf] = self._reaches_backward(leaf)
        return self._known[leaf]

    def _reaches_backward(self, leaf: fx.Node) -> bool:
        """Whether a gradient is computed from the leaf, or from what is cheaply made of it."""
        seen, stack = {leaf}, [leaf]
        while stack:
            for user in stack.pop().users:
                if user in self.narrowed or user in seen or user.op == "output":
                    continue
                if user in self.flow.gradients:
                    return True
                if is_cheap(user):
                    seen.add(user)
                    stack.append(user)
        return False


def _is_small(node: fx.Node, size: int | None) -> bool:
    """Whether a node makes less than a 16th of ``size`` elements, by the hints."""
    made = node.meta.get("val")
    own = hint(made.numel()) if isinstance(made, torch.Tensor) else None
    return own is not None and size is not None and own * 16 <= size


def is_cheap(node: fx.Node) -> bool:
    """A pointwise op, a cast or a view: what the backward makes again rather than reads."""
    is_one = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return is_one or node.target in CASTS or is_view(node)
