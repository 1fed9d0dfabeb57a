"""Low-precision training as a torch.compile backend."""

from lpcompile.api import compile_blocks, lowprec
from lpcompile.convert import convert
from lpcompile.dumps import dump
from lpcompile.errors import LowPrecisionError, LowPrecisionWarning
from lpcompile.explain import explain
from lpcompile.formats import FORMATS, Format
from lpcompile.functional import linear
from lpcompile.gemm import Quantized
from lpcompile.grouped import grouped_mm
from lpcompile.options import Options, Rule, set_defaults
from lpcompile.quantized import dequantize, quantize
from lpcompile.recipes import RECIPES, Gemm, Operand, Recipe
from lpcompile.report import Report, Row
from lpcompile.switch import switch

__all__ = [
    "FORMATS",
    "RECIPES",
    "Format",
    "Gemm",
    "LowPrecisionError",
    "LowPrecisionWarning",
    "Operand",
    "Options",
    "Quantized",
    "Recipe",
    "Report",
    "Row",
    "Rule",
    "compile_blocks",
    "convert",
    "dequantize",
    "dump",
    "explain",
    "grouped_mm",
    "linear",
    "lowprec",
    "quantize",
    "set_defaults",
    "switch",
]
