"""The cost model against measurements of one H200, and the decisions that it must make."""

import pytest
from oracle import to_nearest

from lpcompile import cost
from lpcompile.errors import OptionError
from lpcompile.recipes import PRODUCTS, RECIPES, Gemm, Operand

TENSOR = RECIPES["fp8_tensorwise"].fprop
ROW = RECIPES["fp8_rowwise"]
BLOCK = RECIPES["fp8_blockwise"]
LLAMA = [  # (M, N, K) of every linear: 2 x 8192 tokens of 8B, 1 x 8192 of 70B
    *((16384, n, k) for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))),
    *((8192, n, k) for n, k in ((8192, 8192), (28672, 8192), (8192, 28672))),
]
KINDS = [  # the columns of MEASURED
    ("bf16", "", False),
    *((("fp8", s, f)) for s in ("tensor", "row") for f in (True, False)),
    ("fp8", "square", False),
    ("fp8", "block", False),
]
# TFLOP/s of one H200, torch 2.11, random data: (M, K, N), then one of each of KINDS
MEASURED = {
    (16384, 4096, 14336): (687, 1313, 1240, 1272, 1144, 1080, 879),
    (16384, 14336, 4096): (675, 1304, 1295, 1320, 1194, 1105, 894),
    (16384, 4096, 4096): (704, 1445, 1229, 1357, 1184, 1130, 927),
    (16384, 8192, 28672): (665, 1285, 1245, 1316, 1245, 1130, 925),
}
# (E, sum M, K, N): fprop in bf16, FP8 by rows fast and precise, by 1x128 and 128x128; wgrad in
# bf16, FP8 by rows, by 1x128. Groups are unequal.
GROUPED = {
    (64, 98304, 2048, 1408): (602, 1085, 926, 933, 531, 1066, 799),
    (64, 98304, 1408, 2048): (644, 1032, 950, 990, 530, 1030, 782),
    (128, 131072, 2048, 768): (615, 1079, 1021, 957, 521, 824, 718),
    (8, 65536, 7168, 2048): (668, 1246, 1164, 1122, 648, 1192, 843),
    (8, 196608, 2048, 1408): (588, 1109, 992, 1116, 568, 1192, 778),
    (4, 65536, 5120, 8192): (625, 1254, 1155, 976, 606, 1241, 784),
}


def gemm_us(product, kind, fast, size, grouped=False):
    """The model's time of a GEMM alone, quantization left out."""
    rate = (cost.H200.grouped if grouped else cost.H200.rates)[kind]
    flops = rate.fast if fast else rate.precise
    width = 2.0 if kind[0] == "bf16" else 1.0
    formula = cost._gemm_us(product, cost.H200, rate, flops, (width, width), grouped)
    return float(formula.subs(dict(zip((cost.M, cost.N, cost.K, cost.E), size, strict=True))))


def relative_error(us, m, n, k, tflops):
    return (2 * m * n * k / (tflops * 1e6)) / us - 1


@pytest.mark.parametrize("shape", MEASURED, ids=str)
@pytest.mark.parametrize(("column", "kind"), list(enumerate(KINDS)), ids=str)
def test_a_dense_gemm_is_predicted_within_a_tenth(shape, column, kind):
    m, k, n = shape
    us = gemm_us("fprop", kind[:2], kind[2], (m, n, k, 1))
    assert abs(relative_error(us, m, n, k, MEASURED[shape][column])) < 0.10


@pytest.mark.parametrize("shape", GROUPED, ids=str)
@pytest.mark.parametrize(
    ("column", "product", "kind", "fast", "bound"),
    [
        (0, "fprop", ("bf16", ""), False, 0.15),
        (1, "fprop", ("fp8", "row"), True, 0.12),
        (2, "fprop", ("fp8", "row"), False, 0.12),
        (3, "fprop", ("fp8", "square"), False, 0.12),
        (4, "wgrad", ("bf16", ""), False, 0.15),
        (5, "wgrad", ("fp8", "row"), False, 0.12),
        (6, "wgrad", ("fp8", "block"), False, 0.12),
    ],
)
def test_a_grouped_gemm_is_predicted_as_it_was_measured(shape, column, product, kind, fast, bound):
    e, m, k, n = shape
    us = gemm_us(product, kind, fast, (m, n, k, e), grouped=True)
    assert abs(relative_error(us, m, n, k, GROUPED[shape][column])) < bound


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_every_large_linear_of_llama_pays_on_an_h200(shape, recipe, product):
    estimate = cost.gain(product, RECIPES[recipe].gemm(product), *shape, cost.H200)
    assert estimate.profitable
    assert estimate.speedup < 2


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.is_bf16])
@pytest.mark.parametrize("device", cost.DEVICES.values(), ids=lambda d: d.name)
def test_a_tiny_gemm_pays_nowhere(product, name, device):
    gemm = RECIPES[name].gemm(product)
    if gemm is None:
        return
    for shape in ((0, 256, 256), (1, 1024, 1024), (256, 256, 256), (16, 4096, 4096)):
        assert not cost.gain(product, gemm, *shape, device).profitable


def test_a_small_projection_pays_in_wgrad_only_when_its_input_is_shared():
    def pays(**kwargs):
        return cost.gain("wgrad", ROW.wgrad, 16384, 1024, 4096, cost.H200, **kwargs).profitable

    assert not pays()
    assert pays(readers=(1, 3))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("num_groups", [1, 8])
@pytest.mark.parametrize("gemm", [TENSOR, ROW.wgrad, BLOCK.fprop], ids=["tensor", "row", "square"])
def test_time_never_falls_as_a_size_grows(gemm, product, num_groups):
    sizes = [1, 100, 128, 129, 700, 1024, 4000, 4096, 16384, 65536]
    for at in range(3):
        times = []
        for size in sizes:
            shape = [4096, 4096, 4096]
            shape[at] = size
            times.append(cost.gain(product, gemm, *shape, cost.H200, num_groups=num_groups))
        for one in ([t.bf16_us for t in times], [t.lowprec_us for t in times]):
            assert one == sorted(one)
            assert one[0] < one[-1]


def test_what_a_device_has_no_tensor_cores_for_never_pays():
    for shape in LLAMA:
        assert not cost.gain("fprop", TENSOR, *shape, cost.DEVICES["a100"]).profitable
        assert not cost.gain("fprop", BLOCK.fprop, *shape, cost.DEVICES["b200"]).profitable


def test_the_default_target_is_the_first_that_multiplies_the_formats():
    mxfp8 = Gemm(Operand("mxfp8", (1, 32)), Operand("mxfp8", (1, 32)))
    nvfp4 = Gemm(Operand("nvfp4", (1, 16)), Operand("nvfp4", (16, 16)))
    assert cost.target_for(ROW.fprop) is cost.H200
    for gemm in (mxfp8, nvfp4):
        assert cost.target_for(gemm) is cost.DEVICES["b200"]
        assert cost.gain("fprop", gemm, 16384, 14336, 4096, cost.target_for(gemm)).profitable
        assert not cost.gain("fprop", gemm, 16384, 14336, 4096, cost.H200).profitable


def test_emulated_time_is_bf16s_and_that_of_reading_and_writing_each_operand():
    m, n, k = 16384, 14336, 4096
    mxfp8 = RECIPES["mxfp8"]
    estimate = cost.gain("fprop", mxfp8.fprop, m, n, k, cost.H200)
    us = 4 * (m * k + n * k) / (cost.QUANTIZE_SHARE * cost.H200.bandwidth) * 1e6
    assert estimate.lowprec_us - estimate.bf16_us == pytest.approx(us + 2 * cost.LAUNCH_US)


def test_stochastic_rounding_in_software_takes_as_long_as_its_random_words():
    m, n, k = 16384, 14336, 4096
    nearest, stochastic = (
        cost.gain("dgrad", gemm, m, n, k, cost.H200).lowprec_us
        for gemm in (to_nearest(RECIPES["nvfp4"]).dgrad, RECIPES["nvfp4"].dgrad)
    )
    read = 6 * m * n / (cost.QUANTIZE_SHARE * cost.H200.bandwidth) * 1e6
    words = m * n / (132 * cost.RANDOM_WORDS) * 1e6
    assert stochastic - nearest == pytest.approx(words - read)
    on_blackwell = cost.gain("dgrad", RECIPES["nvfp4"].dgrad, m, n, k, cost.DEVICES["b200"])
    assert on_blackwell.profitable


def test_quantize_traffic_is_what_the_ops_move():
    """x 1x128 and w 128x128 are read once and written narrow; columns are read twice."""
    m, n, k = 4096, 2048, 1024
    bytes_per_us = cost.QUANTIZE_SHARE * cost.H200.bandwidth / 1e6

    def quantize_us(product, gemm):
        flops, rate = 1e30, cost.Rate(1e30, 1e30)
        free = cost.Device(
            name="free", num_sms=1, bandwidth=cost.H200.bandwidth, measured=False,
            rates={("bf16", ""): rate, cost.kind(gemm): rate}, grouped={},
        )  # fmt: skip
        alone = cost._gemm_us(product, free, rate, flops, (1.0, 1.0), False)
        formula = cost.expression(product, gemm, free) - alone
        return float(formula.subs({cost.M: m, cost.N: n, cost.K: k, cost.E: 1}))

    launch = cost.LAUNCH_US
    assert quantize_us("fprop", BLOCK.fprop) == pytest.approx(
        3 * (m * k + n * k) / bytes_per_us + 2 * launch
    )
    assert quantize_us("dgrad", ROW.dgrad) == pytest.approx(
        (3 * m * n + 5 * n * k) / bytes_per_us + 3 * launch
    )
    assert quantize_us("wgrad", ROW.wgrad) == pytest.approx(
        5 * (m * n + m * k) / bytes_per_us + 4 * launch
    )


def test_expressions_are_in_the_four_letters():
    formula = cost.expression("fprop", ROW.fprop, cost.H200)
    assert formula.free_symbols <= {cost.M, cost.N, cost.K, cost.E}
    assert cost.M in formula.free_symbols


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'h200'"):
        cost.get_device("h2000")
