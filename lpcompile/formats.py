"""Number formats, as data. Nothing else in lpcompile knows a bit width or a maximum.

An operand is ``values`` in a narrow element type and ``scales`` that undo the narrowing. What a
format's ``scaling`` computes, to the bit:

    fp32    encode scale f32(max / max(f64(amax), 1e-12)); the scales kept are its reciprocal
    pow2    the same, rounded down to a power of two
    rceil   e8m0: the smallest power of two that brings amax to ``max`` or below
    floor   e8m0: the OCP rule, floor(log2 amax) - floor(log2 max) (OCP MX 1.0)
    nvfp4   e4m3 per 16 elements, under one fp32 scale for the tensor (arXiv 2509.25149)
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lpcompile.errors import RecipeError, did_you_mean

Scaling = Literal["fp32", "pow2", "rceil", "floor", "nvfp4"]

_FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FP4 = {torch.float4_e2m1fn_x2: 6.0}
_MX = {"scale": torch.float8_e8m0fnu, "tensor_scale": False, "swizzled": True}
_PLAIN = {"scale": torch.float32, "tensor_scale": False, "swizzled": False}
# What there are quantizers for: the elements of each scaling, each with its largest finite value,
# and what its scales are.
_KNOWN: dict[str, tuple[dict[torch.dtype, float], dict[str, object]]] = {
    "fp32": (_FP8, _PLAIN),
    "pow2": (_FP8, _PLAIN),
    "rceil": (_FP8, _MX),
    "floor": (_FP8, _MX),
    "nvfp4": (_FP4, {"scale": torch.float8_e4m3fn, "tensor_scale": True, "swizzled": True}),
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How values are stored: narrow elements, and the scales that undo the narrowing.

    ``nan_to_num`` replaces NaN and Inf before quantizing. It hides a diverged run, so every
    shipped format leaves it off.
    """

    name: str
    element: torch.dtype
    max: float  # largest finite element
    scale: torch.dtype
    scaling: Scaling
    bits: float  # per element, scales counted at the format's usual block
    tensor_scale: bool = False  # a second scale, fp32, for the whole tensor
    swizzled: bool = False  # scales in the 128x4 tiles that block-scaled tensor cores read
    nan_to_num: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in _KNOWN:
            raise RecipeError(
                f"format {self.name!r} has scaling {self.scaling!r}: "
                f"{did_you_mean(str(self.scaling), _KNOWN)}"
            )
        largest, scales = _KNOWN[self.scaling]
        needed: dict[str, object] = {**scales, "max": largest.get(self.element)}
        for name, value in needed.items():
            if getattr(self, name) != value:
                known = [f"{k}={v}" for k, v in scales.items()]
                elements = ", ".join(f"{e} (max={m})" for e, m in largest.items())
                raise RecipeError(
                    f"format {self.name!r} has {name}={getattr(self, name)!r}, and scaling "
                    f"{self.scaling!r} exists with {', '.join(known)} and the elements {elements}"
                )


FORMATS = {
    f.name: f
    for f in (
        Format(
            name="fp8",
            element=torch.float8_e4m3fn,
            max=448.0,
            scale=torch.float32,
            scaling="fp32",
            bits=8,
        ),
        Format(
            name="fp8_pow2",
            element=torch.float8_e4m3fn,
            max=448.0,
            scale=torch.float32,
            scaling="pow2",
            bits=8,
        ),
        Format(
            name="fp8_e5m2",
            element=torch.float8_e5m2,
            max=57344.0,
            scale=torch.float32,
            scaling="fp32",
            bits=8,
        ),
        Format(
            name="mxfp8",
            element=torch.float8_e4m3fn,
            max=448.0,
            scale=torch.float8_e8m0fnu,
            scaling="rceil",
            bits=8.25,
            swizzled=True,
        ),
        Format(
            name="mxfp8_floor",
            element=torch.float8_e4m3fn,
            max=448.0,
            scale=torch.float8_e8m0fnu,
            scaling="floor",
            bits=8.25,
            swizzled=True,
        ),
        Format(
            name="nvfp4",
            element=torch.float4_e2m1fn_x2,
            max=6.0,
            scale=torch.float8_e4m3fn,
            scaling="nvfp4",
            bits=4.5,
            tensor_scale=True,
            swizzled=True,
        ),
    )
}


def get_format(name: str | Format) -> Format:
    """A Format as it is, or the one of that name; RecipeError names the nearest otherwise."""
    if isinstance(name, Format):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        raise RecipeError(f"no number format {name!r}: {did_you_mean(str(name), FORMATS)}")
    return FORMATS[name]
