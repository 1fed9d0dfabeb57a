"""The eager oracle of grouped products: against fp64, and what reaches what."""

from dataclasses import replace

import pytest
import torch
from oracle import to_nearest

import lpcompile
from lpcompile.errors import RecipeError, ShapeError
from lpcompile.ops.define import per_column, same_bits
from lpcompile.recipes import RECIPES, Gemm, Operand, Recipe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NARROW = {n: to_nearest(r) for n, r in RECIPES.items() if not r.is_bf16}
WHOLE = [  # one scale reaches every token
    n for n, r in NARROW.items() if r.fprop.lhs.block == "tensor" or r.fprop.lhs.fmt.tensor_scale
]
E, K, N = 5, 64, 48
COUNTS = (20, 0, 37, 1, 150)
T = sum(COUNTS)


def problem(device, *, past=0):
    """x, w stored as [E, N, K], the ends of the groups, dy; NaN in ``past`` rows after them."""
    x, dy = (torch.randn(T + past, c, device=device, dtype=torch.bfloat16) for c in (K, N))
    x[T:], dy[T:] = torch.nan, torch.nan
    w = torch.randn(E, N, K, device=device, dtype=torch.bfloat16)
    offs = torch.tensor(COUNTS, device=device).cumsum(0).int()
    return x, w, offs, dy


def run(x, w, offs, dy, recipe):
    """y, dx and dw[E, N, K] of y = x @ w[e].T."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = lpcompile.grouped_mm(x, w.mT, offs, recipe=NARROW.get(recipe, recipe))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return y.detach(), dx, dw


def narrow(x, operand):
    """x[R, C], quantized along C as NUMERICS says and back, in fp64: written apart from the ops.

    In small blocks through ``lpcompile.quantize``, whose bytes are held to an independent
    implementation's. A Hadamard transform stays in it.
    """
    if operand is None:
        return x.double()
    if operand.fmt.swizzled:
        wide = lpcompile.dequantize(lpcompile.quantize(x.bfloat16().contiguous(), operand))
        return (wide if operand.hadamard else wide[:, : x.shape[1]]).double()
    R, C = x.shape
    rows, columns = {"tensor": (R, C), "row": (1, C)}.get(operand.block, operand.block)
    wide = torch.zeros(-(-R // rows) * rows, -(-C // columns) * columns, dtype=torch.float64)
    wide[:R, :C] = x
    blocks = wide.view(wide.shape[0] // rows, rows, -1, columns)
    scale = 448 / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12)
    scale = scale.float().double()
    if operand.fmt.scaling == "pow2":
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    values = (blocks * scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
    return (values / scale).view(wide.shape)[:R, :C]


def expected(x, w, offs, dy, recipe):
    """y, dx and dw from fp64 products of the operands as narrowed by ``narrow``."""
    x, w, dy = x.cpu().double(), w.cpu().double(), dy.cpu().double()
    recipe = recipe.grouped or recipe
    bounds = [0, *offs.tolist()]

    def of(product):
        gemm = recipe.gemm(product)
        return (gemm.lhs, gemm.rhs) if gemm else (None, None)

    def apart(t, operand, e):
        """Group e of tokens that are contracted over channels: one scale for all if "tensor"."""
        return narrow(t, operand)[bounds[e] : bounds[e + 1]]

    def along(t, operand, e):
        """Group e transposed, narrowed along tokens."""
        rows = slice(bounds[e], bounds[e + 1])
        if operand is not None and operand.block == "tensor":
            return narrow(t, operand)[rows].t()
        return narrow(t[rows].t(), operand) if rows.stop > rows.start else t[rows].t()

    y, dx, dw = [], [], []
    for e in range(E):
        lhs, rhs = of("fprop")
        y.append(apart(x, lhs, e) @ narrow(w[e], rhs).t())
        lhs, rhs = of("dgrad")
        dx.append(apart(dy, lhs, e) @ narrow(w[e].t(), rhs).t())
        lhs, rhs = of("wgrad")
        dw.append(along(dy, lhs, e) @ along(x, rhs, e).t())
    return torch.cat(y), torch.cat(dx), torch.stack(dw)


def groups_of(t, offs):
    return torch.tensor_split(t, offs.tolist()[:-1]) if t.dim() == 2 else t


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NARROW)
def test_every_product_meets_fp64_per_column_and_group(name, device):
    x, w, offs, dy = problem(device)
    made = run(x, w, offs, dy, name)
    for what, got, right in zip(
        ("y", "dx", "dw"), made, expected(x, w, offs, dy, NARROW[name]), strict=True
    ):
        pairs = zip(groups_of(got.cpu(), offs), groups_of(right, offs), strict=True)
        for e, pair in enumerate(pairs):
            assert per_column(0.01)(*pair) == "", f"{what} of group {e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NARROW)
def test_rows_past_the_last_group_reach_nothing(name, device):
    x, w, offs, dy = problem(device, past=19)
    y, dx, dw = run(x, w, offs, dy, name)
    clean = run(x[:T], w, offs, dy[:T], name)
    assert same_bits((y[:T], dx[:T], dw), clean) == ""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [n for n in NARROW if n not in WHOLE])
def test_a_nan_in_a_token_reaches_its_row_and_its_expert_and_no_other(name, device):
    x, w, offs, dy = problem(device)
    x[30, 5] = torch.nan  # in group 2
    y, dx, dw = run(x, w, offs, dy, name)
    assert y[30].isnan().all()
    assert not y[torch.arange(T, device=device) != 30].isnan().any()
    assert not dx.isnan().any()
    assert dw[2, :, 5].isnan().all()
    assert not dw[2, :, torch.arange(K, device=device) != 5].isnan().any()
    assert not dw[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_under_the_scale_of_a_tensor_reaches_its_expert_and_every_token(device):
    x, w, offs, dy = problem(device)
    x[30, 5] = torch.nan  # in group 2
    y, dx, dw = run(x, w, offs, dy, "nvfp4")
    assert y.isnan().all()
    assert not dx.isnan().any()
    assert dw[2].isnan().all()
    assert not dw[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_gradients_follow_the_generator_and_no_row_past_the_last_group(device):
    x, w, offs, dy = problem(device, past=19)
    zeros = x.nan_to_num(), w, offs, dy.nan_to_num()

    def drawn(seed, *args):
        torch.manual_seed(seed)
        y, dx, dw = run(*args, RECIPES["nvfp4"])
        return y[:T], dx[:T], dw

    made = drawn(1, x, w, offs, dy)
    assert same_bits(drawn(1, *zeros), made) == ""
    other = drawn(2, x, w, offs, dy)
    assert same_bits(other[0], made[0]) == ""
    assert not torch.equal(other[1], made[1])
    assert not torch.equal(other[2], made[2])


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_gradients_average_to_those_of_the_unrounded_one(device):
    """Of dY alone: x and w are of values and blocks that NVFP4 holds."""
    _, _, offs, dy = problem(device)
    x = torch.full((T, K), 3.0, device=device).bfloat16()
    w = torch.full((E, N, K), 6.0, device=device).bfloat16()
    recipe = RECIPES["nvfp4"]
    plain = replace(recipe.wgrad, lhs=recipe.dgrad.lhs, rhs=recipe.fprop.lhs)
    recipe = replace(recipe, wgrad=plain)  # no transform
    torch.manual_seed(3)
    runs = [run(x, w, offs, dy, recipe)[1:] for _ in range(64)]
    true = (
        dy.double().sum(1) * 6,
        torch.stack([t.double().sum(0) * 3 for t in torch.tensor_split(dy, offs[:-1].tolist())]),
    )
    for of_runs, mean_of, expected in zip(
        zip(*runs, strict=True), (lambda t: t[:, 0], lambda t: t[:, :, 0]), true, strict=True
    ):
        every = torch.stack([mean_of(t).double() for t in of_runs])
        one, mean = ((e - expected).norm() / expected.norm() for e in (every[0], every.mean(0)))
        assert one > 0.03
        assert mean < one / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NARROW)
def test_an_infinite_gradient_reaches_the_gradients(name, device):
    x, w, offs, dy = problem(device)
    dy[100, 3] = torch.inf
    _, dx, dw = run(x, w, offs, dy, name)
    assert not dx[100].isfinite().any()
    assert not dw[4, 3].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NARROW)
def test_no_tokens_give_zero_gradients(name, device):
    x, w, _, dy = problem(device)
    offs = torch.zeros(E, device=device, dtype=torch.int32)
    y, dx, dw = run(x[:0], w, offs, dy[:0], name)
    assert (y.shape, dx.shape) == ((0, N), (0, K))
    assert not dw.any()


@pytest.mark.parametrize("name", NARROW)
def test_a_weight_stored_the_other_way_round_gives_the_same_bits(name):
    x, w, offs, dy = problem("cpu")
    made = run(x, w, offs, dy, name)
    other = run(x, w.mT.contiguous().mT, offs, dy, name)
    assert same_bits(other, made) == ""


def test_the_grouped_part_of_a_recipe_is_what_counts():
    x, w, offs, dy = problem("cpu")
    both = Recipe(None, None, None, grouped=RECIPES["fp8_rowwise"])
    assert same_bits(run(x, w, offs, dy, both), run(x, w, offs, dy, "fp8_rowwise")) == ""


@pytest.mark.parametrize(("name", "size"), [("fp8_pow2", 128), ("mxfp8", 32), ("nvfp4", 16)])
def test_blocks_of_tokens_that_would_straddle_groups_are_refused(name, size):
    square = Operand(name, (size, size))
    gemm = Gemm(square, square)
    x, w, offs, _ = problem("cpu")
    with pytest.raises(RecipeError, match=rf"tokens .* cannot be .* \({size}, {size}\)"):
        lpcompile.grouped_mm(x, w.mT, offs, recipe=Recipe(gemm, gemm, gemm))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, w, offs: (x.float(), w, offs), "cast both to bf16"),
        (lambda x, w, offs: (x[:, 1:], w, offs), r"got \[208, 63\] and \[5, 64, 48\]"),
        (lambda x, w, offs: (x, w, offs.long()), r"int32, got torch.int64\[5\]"),
        (lambda x, w, offs: (x, w, offs[1:]), r"5 groups"),
    ],
)
def test_what_it_does_not_take_is_said_with_what_to_do(change, said):
    x, w, offs, _ = problem("cpu")
    with pytest.raises(ShapeError, match=said):
        lpcompile.grouped_mm(*change(x, w.mT, offs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NARROW)
def test_nothing_waits_for_the_device(name):
    args = problem("cuda", past=19)
    run(*args, name)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*args, name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NARROW)
def test_a_captured_step_follows_new_groups(name):
    x, w, offs, dy = problem("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(x, w, offs, dy, name)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run(x, w, offs, dy, name)
    for counts in (COUNTS, (0, 0, T, 0, 0), (50, 50, 50, 50, 3), (1, 2, 3, 4, 5)):
        x.normal_()
        offs.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        kept = sum(counts)
        again = run(x, w, offs, dy, name)
        pairs = ((made[0][:kept], again[0][:kept]), (made[1][:kept], again[1][:kept]))
        assert same_bits(*zip(*pairs, (made[2], again[2]), strict=True)) == ""
