"""What narrowing a GEMM gains: time of the product in bf16 and narrowed, from M, N, K and E alone.

    bf16     = launch + max(waves * tile time, bytes / bandwidth)
    narrowed = the same at the narrow rate + quantize bytes / bandwidth + a launch a kernel
    emulated = the same at bf16's rate + the bytes of operands read and written again in bf16

The letters are the linear's in every product: X[M, K], W[N, K], dY[M, N]; in a grouped linear M
counts the rows of all E groups. Expressions are sympy's, so that they can be printed. Nothing here
looks at the machine it runs on: what is narrowed must not depend on it.

What several GEMMs read (the input of w1 and w3, of q, k and v) is quantized once, so each pays its
share: ``readers``. Charging every reader in full leaves wgrad of a small k or v projection in bf16
(8B: 210 us, narrowed 256 us alone, 187 us as one of three). What is merged with another quantize or
with what makes its operand (``passes/fuse.py``), or narrowed under an amax that the forward took,
reads less: ``reads``. Charging SwiGLU's gradients in full leaves most products of small experts in
bf16, where they gain when fused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import sympy

from lpcompile.errors import OptionError, did_you_mean
from lpcompile.recipes import Gemm, Operand, Product

M, N, K, E = sympy.symbols("M N K E", integer=True, positive=True)

TILE = 128  # rows and columns; cuBLAS takes wider ones where they waste no more than this one
PIECES = 4  # into which a tile can be cut, or its contraction split, to fill a last wave
QUANTIZE_SHARE = 0.8  # of copy bandwidth: what `bench kernels` holds every quantize kernel to
LAUNCH_US = 3.0  # from the end of one kernel to full rate in the next; assumed, not measured
# Random words per SM and second, of stochastic rounding in software: 66 instructions an element
# (16384 x 4096 to 131072 x 7168, H200). Blackwell rounds four elements with one word.
RANDOM_WORDS = 2.3e9


class Rate(NamedTuple):
    """FLOP/s of a full GPU, accumulating in fp32 and in the tensor core's own registers.

    fill: steps of the contraction that a tile's start and end cost.
    """

    precise: float
    fast: float
    fill: int = 0


# (family, what shares a scale) -> Rate. The families: "bf16", "fp8", "mxfp8", "nvfp4".
Rates = Mapping[tuple[str, str], Rate]
Reads = tuple[int | None, int | None]

_FAMILY = {"fp32": "fp8", "pow2": "fp8", "rceil": "mxfp8", "floor": "mxfp8", "nvfp4": "nvfp4"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """What the cost model knows of a GPU. A kind of GEMM without a rate is emulated in bf16."""

    name: str
    num_sms: int
    bandwidth: float  # bytes/s of a copy, read and written bytes counted
    rates: Rates
    grouped: Rates
    measured: bool  # False: datasheet peaks times the share of its peak that an H200 reaches


@dataclass(frozen=True)
class Estimate:
    """Microseconds of one product."""

    bf16_us: float
    lowprec_us: float

    @property
    def speedup(self) -> float:
        """How many times faster narrowed than in bf16."""
        return self.bf16_us / self.lowprec_us

    @property
    def profitable(self) -> bool:
        """Whether narrowing takes less time, what quantization costs included."""
        return self.lowprec_us < self.bf16_us


# One H200, torch 2.11, cuBLAS and CUTLASS, random data, within 10% from 16384 x 4096 x 4096 to
# 16384 x 8192 x 28672. tests/test_cost.py holds the measurements.
_DENSE: Rates = {
    ("bf16", ""): Rate(685e12, 685e12),
    ("fp8", "tensor"): Rate(1265e12, 1365e12),
    ("fp8", "row"): Rate(1197e12, 1320e12),
    ("fp8", "square"): Rate(1110e12, 1110e12),  # 1x128 by 128x128
    ("fp8", "block"): Rate(907e12, 907e12),  # 1x128 by 1x128
}
# The same for grouped GEMMs of 4 to 128 groups: FP8 by ``lpcompile.ops.wgmma``, within 12%; bf16
# within 15%.
_GROUPED: Rates = {
    ("bf16", ""): Rate(640e12, 640e12, fill=150),
    ("fp8", "tensor"): Rate(1160e12, 1260e12, fill=300),
    ("fp8", "row"): Rate(1160e12, 1260e12, fill=300),
    ("fp8", "square"): Rate(1140e12, 1140e12, fill=300),
    ("fp8", "block"): Rate(860e12, 860e12, fill=300),
}
_HOPPER_PEAK = {"bf16": 989e12, "fp8": 1979e12}  # https://www.nvidia.com/en-us/data-center/h200/
_HOPPER_BANDWIDTH = 4.8e12

H200 = Device(
    name="h200",
    num_sms=132,
    bandwidth=4.26e12,
    rates=MappingProxyType(_DENSE),
    grouped=MappingProxyType(_GROUPED),
    measured=True,
)


def _from_datasheet(
    name: str, num_sms: int, bandwidth: float, peaks: dict[str, float], kinds: str
) -> Device:
    """A Device of datasheet peaks (dense FLOP/s, bytes/s), at the H200's shares of its own.

    kinds: which FP8 scales its libraries multiply without emulation.
    """

    def scaled(table: Rates) -> Rates:
        made = {}
        for (family, scales), rate in table.items():
            if family in peaks and (family == "bf16" or scales in kinds.split()):
                up = peaks[family] / _HOPPER_PEAK[family]
                made[family, scales] = Rate(rate.precise * up, rate.fast * up, rate.fill)
        precise = table["fp8", "row"]
        for family in ("mxfp8", "nvfp4"):
            if family in peaks:
                at = precise.precise * peaks[family] / _HOPPER_PEAK["fp8"]
                made |= {(family, s): Rate(at, at, precise.fill) for s in ("block", "square")}
        return MappingProxyType(made)

    return Device(
        name=name,
        num_sms=num_sms,
        bandwidth=bandwidth * H200.bandwidth / _HOPPER_BANDWIDTH,
        rates=scaled(_DENSE),
        grouped=scaled(_GROUPED),
        measured=False,
    )


_BLACKWELL = {"bf16": 2.25e15, "fp8": 4.5e15, "mxfp8": 4.5e15, "nvfp4": 9e15}
_GRACE_BLACKWELL = {"bf16": 2.5e15, "fp8": 5e15, "mxfp8": 5e15, "nvfp4": 10e15}

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        H200,
        # https://www.nvidia.com/en-us/data-center/a100/ (no FP8: everything is emulated)
        _from_datasheet("a100", 108, 2.04e12, {"bf16": 312e12}, ""),
        # https://www.nvidia.com/en-us/data-center/h100/ (SXM)
        _from_datasheet("h100", 132, 3.35e12, _HOPPER_PEAK, "tensor row square block"),
        # https://www.nvidia.com/en-us/data-center/hgx/ (an eighth of HGX B200, dense)
        _from_datasheet("b200", 148, 8e12, _BLACKWELL, "tensor row"),
        # https://www.nvidia.com/en-us/data-center/gb200-nvl72/ (a 72nd of the rack, dense)
        _from_datasheet("gb200", 148, 8e12, _GRACE_BLACKWELL, "tensor row"),
        # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
        # Its FP8 is e4m3fnuz, which lpcompile has no ops for: a prediction for planning only.
        _from_datasheet("mi300x", 304, 5.3e12, {"bf16": 1307e12, "fp8": 2615e12}, "tensor row"),
        # https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html
        _from_datasheet(
            "mi355x", 256, 8e12, {"bf16": 2.5e15, "fp8": 5e15, "mxfp8": 5e15}, "tensor row"
        ),
    )
}


def get_device(name: str | Device) -> Device:
    """A Device as it is, or the one of that name; OptionError names the nearest otherwise."""
    if isinstance(name, Device):
        return name
    if name not in DEVICES:
        raise OptionError(f"no target {name!r}: {did_you_mean(str(name), DEVICES)}")
    return DEVICES[name]


def target_for(gemm: Gemm) -> Device:
    """The device to decide for when the user names none: the H200, or the B200 if only it can."""
    return H200 if is_native(gemm, H200) else DEVICES["b200"]


def is_native(gemm: Gemm, device: Device) -> bool:
    """Whether the device's tensor cores multiply these formats."""
    return kind(gemm) in device.rates


def is_wide(gemm: Gemm, device: Device) -> bool:
    """Whether ``passes/emulate.py`` multiplies these formats there, in bf16."""
    return not is_native(gemm, device) and gemm.lhs.fmt.swizzled


def gain(
    product: Product,
    gemm: Gemm,
    m: int,
    n: int,
    k: int,
    device: Device,
    *,
    num_groups: int = 1,
    readers: tuple[int, int] = (1, 1),
    reads: Reads = (None, None),
) -> Estimate:
    """The Estimate of one product of a linear X[m, k], W[n, k], or of num_groups experts.

    readers: how many GEMMs read the quantized lhs and rhs; this one pays its share of each.
    reads: how often lhs and rhs are read for it, None for as often as by the op alone.
    """
    grouped = num_groups > 1
    bf16 = _compiled(product, None, device, grouped, (1, 1), (None, None))
    lowprec = _compiled(product, gemm, device, grouped, readers, reads)
    size = (m, n, k, num_groups)
    return Estimate(float(bf16(*size)), float(lowprec(*size)))


@cache
def expression(
    product: Product,
    gemm: Gemm | None,
    device: Device,
    grouped: bool = False,
    readers: tuple[int, int] = (1, 1),
    reads: Reads = (None, None),
) -> sympy.Expr:
    """Microseconds of a product in the symbols M, N, K, E; a gemm of None is bf16."""
    wide = gemm is not None and is_wide(gemm, device)
    total = gemm_expression(product, None if wide else gemm, device, grouped)
    if gemm is not None:
        sides = zip((gemm.lhs, gemm.rhs), _operands(product), readers, reads, strict=True)
        for operand, (elements, transposed), num_readers, num_reads in sides:
            if num_reads is None:
                num_reads = _num_reads(operand, transposed)
            total += _quantize_us(operand, elements, num_reads, device, wide) / num_readers
    return total


@cache
def gemm_expression(
    product: Product, gemm: Gemm | None, device: Device, grouped: bool = False
) -> sympy.Expr:
    """Microseconds of the GEMM alone, of operands quantized before."""
    rates = device.grouped if grouped else device.rates
    bf16 = rates["bf16", ""]
    rate = rates.get(kind(gemm)) if gemm is not None else None
    if gemm is not None and rate is not None:
        flops = rate.fast if gemm.fast_accum else rate.precise
        widths = (gemm.lhs.fmt.bits / 8, gemm.rhs.fmt.bits / 8)
        return _gemm_us(product, device, rate, flops, widths, grouped)
    total = _gemm_us(product, device, bf16, bf16.precise, (2.0, 2.0), grouped)
    if gemm is not None:  # emulated: read narrow, write bf16
        for operand, (elements, _) in zip((gemm.lhs, gemm.rhs), _operands(product), strict=True):
            moved = elements * (operand.fmt.bits / 8 + 2)
            total += LAUNCH_US + moved / device.bandwidth * 1e6
    return total


@cache
def _compiled(
    product: Product,
    gemm: Gemm | None,
    device: Device,
    grouped: bool,
    readers: tuple[int, int],
    reads: Reads,
) -> Callable[..., float]:
    formula = expression(product, gemm, device, grouped, readers, reads)
    return sympy.lambdify((M, N, K, E), formula, modules="math")


def kind(gemm: Gemm) -> tuple[str, str]:
    """Which rate a GEMM runs at: its family of formats, and what shares a scale."""
    family, along = _FAMILY[gemm.lhs.fmt.scaling], gemm.lhs.along
    if isinstance(along, str):
        return family, along
    square = (along, along) in (gemm.lhs.block, gemm.rhs.block)
    return family, "square" if square else "block"


def _operands(product: Product) -> tuple[tuple[sympy.Expr, bool], tuple[sympy.Expr, bool]]:
    """For lhs and rhs: how many elements, and whether scales run across rows as stored."""
    x, w, dy = M * K, E * N * K, M * N
    return {
        "fprop": ((x, False), (w, False)),
        "dgrad": ((dy, False), (w, True)),
        "wgrad": ((dy, True), (x, True)),
    }[product]


def _num_reads(operand: Operand, transposed: bool) -> int:
    """How often an op alone reads a bf16 operand: once, or for its amax before that."""
    across_rows = operand.along == "row" and transposed
    twice = operand.along == "tensor" or across_rows or operand.fmt.tensor_scale
    return 2 if twice else 1


def _quantize_us(
    operand: Operand, elements: sympy.Expr, num_reads: int, device: Device, wide: bool
) -> sympy.Expr:
    """Narrowing one bf16 operand: a kernel a read, the last of which writes, what ``wide``."""
    moved = elements * (2 * num_reads + (2 if wide else operand.fmt.bits / 8))
    us = moved / (QUANTIZE_SHARE * device.bandwidth) * 1e6
    if wide and operand.rounding == "stochastic":
        us = sympy.Max(us, elements / (RANDOM_WORDS * device.num_sms) * 1e6)
    return max(num_reads, 1) * LAUNCH_US + us


def _gemm_us(
    product: Product,
    device: Device,
    rate: Rate,
    flops: float,
    widths: tuple[float, float],
    grouped: bool,
) -> sympy.Expr:
    """The GEMM itself: waves of tiles, or its bytes where they take longer."""
    rows, columns, contraction, results = {
        "fprop": (M, N, K, M * N),
        "dgrad": (M, K, N, M * K),
        "wgrad": (N, K, M / E, E * N * K),
    }[product]
    tiles = sympy.ceiling(columns / TILE)
    if product == "wgrad":
        tiles *= E * sympy.ceiling(rows / TILE)
    elif grouped:  # each group of unequal size wastes half a tile, on average
        tiles *= rows / TILE + E / 2
    else:
        tiles *= sympy.ceiling(rows / TILE)
    waves = sympy.ceiling(PIECES * tiles / device.num_sms) / PIECES
    tile_us = 2 * TILE * TILE * (contraction + rate.fill) / (flops / device.num_sms) * 1e6
    (lhs, _), (rhs, _) = _operands(product)
    moved = lhs * widths[0] + rhs * widths[1] + 2 * results
    return LAUNCH_US + sympy.Max(waves * tile_us, moved / device.bandwidth * 1e6)
