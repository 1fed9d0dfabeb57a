"""Every op as its launch, in what Inductor generates for a GPU: a call past the dispatcher.

Through the dispatcher a call takes 2 us more, and 3 to 10 where lists and the text of a program
become C++ values on the way (torch 2.11). It is taken on the CPU, and by what looks at ops as they
run: see ``lpcompile.ops.tape``, which also knows what an earlier call of the launch has called.
"""

from collections.abc import Callable
from typing import Any

from torch._inductor.lowering import (
    fallback_handler,
    lowerings,
    make_fallback,
    tag_to_layout_constraint,
)
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag
from torch.utils._pytree import tree_leaves

from lpcompile.errors import OptionError
from lpcompile.ops.define import LAUNCHES

PAST = {"cuda"}  # devices


def fallback(op: Any) -> Callable[..., Any]:
    """A lowering that leaves the op as it is, and has its launch called."""
    whole = fallback_handler(op, add_to_fallback_set=False)

    def lower(*args: Any, **kwargs: Any) -> Any:
        made = whole(*args, **kwargs)
        if V.graph.cpp_wrapper and isinstance(made, list) and len(made) == 1:
            raise OptionError(
                f"cpp_wrapper: {op} returns a list of one tensor here, which torch's C++ code "
                "takes for a tensor and crashes on (2.11 to 2.13): leave it out, and against the "
                'host\'s time use {"triton.cudagraphs": True}'
            )
        first = tree_leaves(made)[0]
        device = first.get_device()
        if device.type in PAST and not (V.graph.cpp_wrapper or V.graph.fx_wrapper):
            (kernel,) = first.data.data.inputs  # of a TensorBox, a StorageBox and an output
            kernel.python_kernel_name += ".launched"
            for x in tree_leaves(made):  # what an op promises is tested, and here not at every step
                x.data.data.skip_size_stride_alignment_checks = True
        return made

    return lower


def register() -> None:
    """As Inductor registers an op that it meets for the first time, but for the call."""
    for op in LAUNCHES:
        if op not in lowerings:
            tag = get_layout_constraint_tag(op, with_default=True)
            make_fallback(op, layout_constraint=tag_to_layout_constraint(tag), warn=False)
            lowerings[op] = fallback(op)


register()
