"""Inductor lowerings of the custom ops. Imported as lpcompile.lowerings."""

from lpcompile.lowerings import launch, quantize_fp8_row

__all__ = ["ALL", "launch", "quantize_fp8_row"]

ALL = (quantize_fp8_row,)

if __name__ != "lpcompile.lowerings":
    raise ImportError("import lpcompile.lowerings, not lowerings: a copy would register twice")
