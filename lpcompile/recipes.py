"""Recipes, as data: how each operand of a linear's three GEMMs is quantized.

    fprop    Y[M, N] =  X[M, K] @ W[N, K].T     contracts K
    dgrad   dX[M, K] = dY[M, N] @ W[N, K]       contracts N
    wgrad   dW[N, K] = dY[M, N].T @ X[M, K]     contracts M

To add a recipe, add an entry to RECIPES. Nothing may branch on a recipe's name.
"""

from dataclasses import dataclass, replace
from types import UnionType
from typing import Literal

from lpcompile.errors import RecipeError, did_you_mean
from lpcompile.formats import Format, get_format

Product = Literal["fprop", "dgrad", "wgrad"]
PRODUCTS: tuple[Product, ...] = ("fprop", "dgrad", "wgrad")
Block = Literal["tensor", "row"] | tuple[int, int]

# The blocks that each scaling has a quantizer for, written (rows, columns); columns run along the
# contraction.
_BLOCKS: dict[str, tuple[Block, ...]] = {
    "fp32": ("tensor", "row", (1, 128), (128, 128)),
    "pow2": ("tensor", "row", (1, 128), (128, 128)),
    "rceil": ((1, 32), (32, 32)),
    "floor": ((1, 32), (32, 32)),
    "nvfp4": ((1, 16), (16, 16)),
}


@dataclass(frozen=True)
class Operand:
    """How one operand is narrowed.

    format: a Format, or the name of one in FORMATS.
    block: "tensor", "row" (one scale along the contraction) or (rows, columns) that share a scale.
    rounding: "stochastic" for gradients only (arXiv 2509.25149).
    hadamard: size of the random Hadamard transform along the contraction; 0 is none.
    """

    format: Format | str
    block: Block
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hadamard: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        legal = _BLOCKS[self.fmt.scaling]
        if self.block not in legal:
            raise RecipeError(
                f"format {self.fmt.name!r} has no quantizer for block {self.block!r}; "
                f"it takes {', '.join(map(repr, legal))}"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise RecipeError(f"rounding is 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.rounding == "stochastic" and self.fmt.scaling != "nvfp4":
            raise RecipeError(
                f"stochastic rounding exists for 4-bit elements, not for {self.fmt.name!r}; "
                "use rounding='nearest'"
            )
        if self.hadamard not in (0, 16) or (self.hadamard and self.fmt.scaling != "nvfp4"):
            raise RecipeError(
                f"a Hadamard transform is 16 wide and for 4-bit elements: got "
                f"hadamard={self.hadamard} with {self.fmt.name!r}; use hadamard=0"
            )

    @property
    def fmt(self) -> Format:
        """The format, which ``__post_init__`` made a Format whatever was given."""
        return get_format(self.format)

    @property
    def along(self) -> int | str:
        """What shares a scale along the contraction: "tensor", "row" or a number of elements."""
        return self.block if isinstance(self.block, str) else self.block[1]


@dataclass(frozen=True)
class Gemm:
    """How a GEMM's two operands are quantized. RecipeError for a pair that no GEMM can multiply.

    fast_accum: accumulate in the tensor core's own registers (about 14 bits), which the field does
    in fprop only.
    """

    lhs: Operand
    rhs: Operand
    fast_accum: bool = False

    def __post_init__(self) -> None:
        a, b = self.lhs, self.rhs
        for side, given in (("lhs", a), ("rhs", b)):
            _check(f"{side} of a Gemm", given, Operand)
        if not isinstance(self.fast_accum, bool):
            raise RecipeError(f"fast_accum is True or False, got {self.fast_accum!r}")
        if a.hadamard != b.hadamard:
            raise RecipeError(
                "a Hadamard transform cancels only when both operands have it: "
                f"lhs has {a.hadamard}, rhs has {b.hadamard}"
            )
        if a.fmt.scale != b.fmt.scale or a.fmt.tensor_scale != b.fmt.tensor_scale:
            raise RecipeError(
                f"no GEMM multiplies {a.fmt.name!r} by {b.fmt.name!r}: their scales differ in kind"
            )
        if a.along != b.along:
            raise RecipeError(
                "both operands need scales over the same stretch of the contraction: "
                f"lhs has {a.block!r}, rhs has {b.block!r}"
            )
        if a.fmt.max == b.fmt.max == 57344.0:
            raise RecipeError("no GEMM multiplies e5m2 by e5m2: make one operand 'fp8'")
        if a.fmt.max != b.fmt.max and a.along != "tensor":
            raise RecipeError(f"{a.fmt.name!r} by {b.fmt.name!r} exists with block='tensor' only")


@dataclass(frozen=True)
class Recipe:
    """One Gemm for each product of a linear, or None, which leaves that product in bf16.

    lhs and rhs are (X, W) in fprop, (dY, W) in dgrad and (dY, X) in wgrad.
    grouped: the Recipe of grouped (mixture-of-experts) GEMMs, where it differs.
    """

    fprop: Gemm | None
    dgrad: Gemm | None
    wgrad: Gemm | None
    grouped: "Recipe | None" = None

    def __post_init__(self) -> None:
        for product in PRODUCTS:
            _check(f"{product} of a Recipe", self.gemm(product), Gemm | None)
        _check("grouped of a Recipe", self.grouped, Recipe | None)
        for product, gemm in (("fprop", self.fprop), ("dgrad", self.dgrad)):
            if gemm and gemm.lhs.hadamard:
                raise RecipeError(
                    f"the Hadamard transform is for wgrad, where it runs along tokens: {product} "
                    "has it; use hadamard=0 there"
                )
        nearest = [("fprop.lhs", self.fprop and self.fprop.lhs)]
        nearest += [
            (f"{p}.rhs", g and g.rhs)
            for p, g in (("fprop", self.fprop), ("dgrad", self.dgrad), ("wgrad", self.wgrad))
        ]
        for where, operand in nearest:
            if operand and operand.rounding == "stochastic":
                raise RecipeError(
                    f"stochastic rounding is for gradients (the lhs of dgrad and wgrad): {where} "
                    "has it; use rounding='nearest' there"
                )
        if self.grouped is not None and self.grouped.grouped is not None:
            raise RecipeError("the recipe in `grouped` cannot have a `grouped` of its own")

    @property
    def is_bf16(self) -> bool:
        """No product is narrowed."""
        return not (self.fprop or self.dgrad or self.wgrad)

    @property
    def is_stochastic(self) -> bool:
        """Some operand is rounded stochastically, so a backward needs a seed."""
        gemms = [g for g in (self.dgrad, self.wgrad) if g]
        return any(g.lhs.rounding == "stochastic" for g in gemms)

    def gemm(self, product: Product) -> Gemm | None:
        """What this recipe says of that product."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}[product]


def _check(what: str, given: object, kind: type | UnionType) -> None:
    if not isinstance(given, kind):
        name = getattr(kind, "__name__", str(kind).replace("lpcompile.recipes.", ""))
        raise RecipeError(f"{what} is an lpcompile.{name}, got {given!r}")


def _fp8_tensorwise() -> Recipe:
    """One scale a tensor; gradients in e5m2, which has the range (arXiv 2209.05433)."""
    e4m3, e5m2 = Operand("fp8", "tensor"), Operand("fp8_e5m2", "tensor")
    grouped = Recipe(Gemm(e4m3, e4m3, fast_accum=True), Gemm(e4m3, e4m3), Gemm(e4m3, e4m3))
    return Recipe(Gemm(e4m3, e4m3, fast_accum=True), Gemm(e5m2, e4m3), Gemm(e5m2, e4m3), grouped)


def _fp8_rowwise() -> Recipe:
    """One power-of-two scale a row, along the contraction of each product."""
    row = Operand("fp8_pow2", "row")
    return Recipe(Gemm(row, row, fast_accum=True), Gemm(row, row), Gemm(row, row))


def _fp8_blockwise() -> Recipe:
    """1x128 activations and gradients, 128x128 weights (DeepSeek-V3, arXiv 2412.19437)."""
    tokens, weight = Operand("fp8_pow2", (1, 128)), Operand("fp8_pow2", (128, 128))
    return Recipe(Gemm(tokens, weight), Gemm(tokens, weight), Gemm(tokens, tokens))


def _mxfp8(name: str) -> Recipe:
    """Every operand alike, 1x32 (arXiv 2506.08027)."""
    gemm = Gemm(Operand(name, (1, 32)), Operand(name, (1, 32)))
    return Recipe(gemm, gemm, gemm)


def _nvfp4() -> Recipe:
    """16x16 weights, stochastic gradients, Hadamard in wgrad (arXiv 2509.25149)."""
    x, w = Operand("nvfp4", (1, 16)), Operand("nvfp4", (16, 16))
    dy = replace(x, rounding="stochastic")
    return Recipe(Gemm(x, w), Gemm(dy, w), Gemm(replace(dy, hadamard=16), replace(x, hadamard=16)))


BF16 = Recipe(None, None, None)
RECIPES: dict[str, Recipe] = {
    "bf16": BF16,
    "fp8_tensorwise": _fp8_tensorwise(),
    "fp8_rowwise": _fp8_rowwise(),
    "fp8_rowwise_wgrad_bf16": replace(_fp8_rowwise(), wgrad=None),
    "fp8_blockwise": _fp8_blockwise(),
    "mxfp8": _mxfp8("mxfp8"),
    "mxfp8_floor": _mxfp8("mxfp8_floor"),
    "mxfp8_wgrad_bf16": replace(_mxfp8("mxfp8"), wgrad=None),
    "nvfp4": _nvfp4(),
}
DEFAULT = "fp8_rowwise"

# What other libraries call these: torchao's Float8LinearConfig, MXLinearConfig and MoE training
# recipe names, TransformerEngine's recipe classes.
ALIASES = {
    "tensorwise": "fp8_tensorwise",
    "rowwise": "fp8_rowwise",
    "rowwise_with_gw_hp": "fp8_rowwise_wgrad_bf16",
    "Float8CurrentScaling": "fp8_tensorwise",
    "Float8BlockScaling": "fp8_blockwise",
    "mxfp8_cublas": "mxfp8_floor",
    "mxfp8_cublas_rceil": "mxfp8",
    "mxfp8_emulated": "mxfp8_floor",
    "mxfp8_rceil": "mxfp8",
    "mxfp8_emulated_rceil": "mxfp8",
    "mxfp8_rceil_wgrad_with_hp": "mxfp8_wgrad_bf16",
    "MXFP8BlockScaling": "mxfp8",
    "NVFP4BlockScaling": "nvfp4",
}


def get_recipe(name: str | Recipe) -> Recipe:
    """A Recipe as it is, or the one of that name; RecipeError names the nearest otherwise.

    Other libraries' names are understood: "rowwise_with_gw_hp" is "fp8_rowwise_wgrad_bf16".
    """
    if isinstance(name, Recipe):
        return name
    known = ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(known, str) or known not in RECIPES:
        raise RecipeError(
            f"no recipe {name!r}: {did_you_mean(str(name), [*RECIPES, *ALIASES])}; "
            "or pass an lpcompile.Recipe"
        )
    return RECIPES[known]


def name_of(recipe: str | Recipe) -> str:
    """The name that a recipe was asked for by, or that it has in RECIPES, or "custom"."""
    if isinstance(recipe, str):
        return recipe
    return next((n for n, r in RECIPES.items() if r == recipe), "custom")
