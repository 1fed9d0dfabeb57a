"""Stacks of experts without the compiler: a module's grouped GEMMs as a recipe says, eager.

Whatever a module of experts does around them (Hugging Face's and torchtitan's differ), it calls
``torch._grouped_mm`` on its weights. The converted module is the same one, of a subclass whose
forward runs with those calls sent to ``lpcompile.grouped_mm``.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lpcompile import grouped
from lpcompile.errors import LowPrecisionWarning
from lpcompile.gemm_grouped import obstacle
from lpcompile.recipes import PRODUCTS, Product, Recipe

CALLS = {torch._grouped_mm, getattr(F, "grouped_mm", None)} - {None}


def obstacles(recipe: Recipe) -> dict[Product, str]:
    """The products of a grouped GEMM that stay bf16 because none exists for them, with reasons."""
    recipe = recipe.grouped or recipe
    gemms = {p: recipe.gemm(p) for p in PRODUCTS}
    reasons = {p: g and obstacle(g, along_tokens=p == "wgrad") for p, g in gemms.items()}
    return {p: reason for p, reason in reasons.items() if reason}


class Narrowed(TorchFunctionMode):
    """Sends grouped GEMMs of bf16 rows and a stack of weights to ``lpcompile.grouped_mm``."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        found = recipe.grouped or recipe
        left = obstacles(recipe)
        fprop, dgrad, wgrad = (None if p in left else found.gemm(p) for p in PRODUCTS)
        self.recipe, self.num_calls = Recipe(fprop, dgrad, wgrad), 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in CALLS or not _is_plain(*args, **kwargs):
            return func(*args, **kwargs)
        self.num_calls += 1
        offs = kwargs["offs"] if "offs" in kwargs else args[2]
        return grouped.grouped_mm(args[0], args[1], offs, recipe=self.recipe)


def _is_plain(x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> bool:
    """Whether a call is x[T, K] @ w[E, K, N] of bf16 operands and nothing more."""
    narrow = x.dtype == w.dtype == torch.bfloat16 and out_dtype in (None, torch.bfloat16)
    return narrow and x.dim() == 2 and w.dim() == 3 and offs is not None and bias is None


class Experts(nn.Module):
    """A module of experts whose grouped GEMMs are narrowed; ``subclass`` puts it before its own."""

    recipe: Recipe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, with its grouped GEMMs narrowed."""
        with Narrowed(self.recipe) as mode:
            made = super().forward(*args, **kwargs)
        if not mode.num_calls and not mode.recipe.is_bf16:
            warnings.warn(
                f"{type(self).__name__} was converted and called no grouped GEMM in bf16, so it "
                "computed as before: cast its operands, or compile it",
                LowPrecisionWarning,
                stacklevel=2,
            )
        return made

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self).__bases__[1],), self.__getstate__()


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the converted modules of a class: one, so that converted modules are alike."""
    if cls not in _subclasses:
        _subclasses[cls] = type(cls.__name__, (Experts, cls), {"__module__": cls.__module__})
    return _subclasses[cls]


def _rebuilt(cls: type[nn.Module]) -> nn.Module:
    made = subclass(cls)
    return made.__new__(made)
