"""Low-precision training as a torch.compile backend."""

from lpcompile.errors import LowPrecisionError, LowPrecisionWarning
from lpcompile.formats import FORMATS, Format
from lpcompile.recipes import RECIPES, Gemm, Operand, Recipe

__all__ = [
    "FORMATS",
    "RECIPES",
    "Format",
    "Gemm",
    "LowPrecisionError",
    "LowPrecisionWarning",
    "Operand",
    "Recipe",
]
