"""Kernels that are launched from what was kept of an earlier launch: which, and with what."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from oracle import FFN, bf16, data
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lpcompile import ops
from lpcompile.backend import lowprec_eager
from lpcompile.ops import blocks, device, fp8, launcher
from lpcompile.ops.launcher import cached

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
SIZES = (0, 1, 2, 15, 16, 17, 32, -1, -15, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, 2**40)
SIZES += (-(2**31), -(2**31) - 1, 2**63 - 1, 2**63, 2**63 + 16)


@cached
@triton.jit
def doubled(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x * 2, mask=at < n)


@cached
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["m"])
def sparing(x_ptr, n, m, k: tl.int32, C: tl.constexpr):
    pass


@cached
@triton.jit
def single(x_ptr):
    pass


class Compiled:
    """What Triton returns of a launch, and what its launcher is given."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, ran):
        self.run = lambda *args: ran.append(args)


@pytest.fixture
def launched(monkeypatch):
    """Launches through Triton, and those past it, of kernels that forget them afterwards."""
    through, past, kept = [], [], []

    def run(kernel, *args, grid, warmup, **options):
        through.append((kernel, args))
        kept.append(kernel._kept)
        return Compiled(past)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: 70 + d, raising=False)
    yield through, past
    for kernels in kept:
        kernels.clear()


def arguments():
    """Arguments of ``sparing`` that differ from each other in one."""
    memory = torch.zeros(64, dtype=torch.int16)
    tensors = [memory, memory[1:], memory[8:], memory[9:], memory.view(torch.bfloat16)[1:], None]
    tensors += [torch.nn.Parameter(memory.view(torch.bfloat16)), memory.view(torch.uint8)[1:]]
    for x in tensors:
        yield x, 5, 7, 9, 11
    for i, size in itertools.product(range(1, 4), SIZES):
        yield memory, *(size if i == k else 5 for k in range(1, 4)), 11
    for constant in (0, 1, 17, None, 0.0, -0.0, (1,), (True,), tl.float32, tl.float16, "a"):
        yield memory, 5, 7, 9, constant


def test_what_triton_tells_apart_has_keys_of_its_own():
    bind = create_function_from_signature(sparing.signature, sparing.params, BACKEND)
    keys, known = {}, 0
    for args in arguments():
        types = tuple(map(type, args))
        of_triton = str((bind(*args)[1], args[-1]))
        key = types, launcher._reader(sparing.params, types)(*args)[0]
        known += key in keys
        assert keys.setdefault(key, of_triton) == of_triton, args
    assert known > 10  # and most of what it does not tell apart has not


def test_a_type_that_is_not_known_goes_tritons_way(launched):
    through, past = launched
    for _ in range(2):
        doubled[(1,)](torch.zeros(8), torch.zeros(8), 8.5, 16)
    assert (len(through), len(past)) == (2, 0)


def test_a_launch_that_is_known_gives_the_launcher_pointers(launched):
    through, past = launched
    x, y = torch.zeros(32), torch.zeros(32)
    doubled[(2,)](x, y, 32, 16, num_warps=2)
    assert (len(through), past) == (1, [])
    z = x.clone()
    doubled[4, 5](z, y, 48, 16, num_warps=2)
    assert len(through) == 1
    given = (z.data_ptr(), y.data_ptr(), 48, 16)
    assert past == [(4, 5, 1, 73, "function", "metadata", None, None, None, *given)]


def test_a_kernel_of_one_argument_is_launched_past_triton(launched):
    through, past = launched
    x = torch.zeros(16)
    for _ in range(2):
        single[(1,)](x)
    assert (len(through), past[0][9:]) == (1, (x.data_ptr(),))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((torch.zeros(33)[1:], torch.zeros(32), 32, 16), {"num_warps": 2}),
        ((torch.zeros(32), torch.zeros(33)[1:], 32, 16), {"num_warps": 2}),
        ((torch.zeros(32).int(), torch.zeros(32), 32, 16), {"num_warps": 2}),
        ((torch.zeros(32), torch.zeros(32), 33, 16), {"num_warps": 2}),
        ((torch.zeros(32), torch.zeros(32), 1, 16), {"num_warps": 2}),
        ((torch.zeros(32), torch.zeros(32), 32, 32), {"num_warps": 2}),
        ((torch.zeros(32), torch.zeros(32), 32, 16), {"num_warps": 4}),
        ((torch.zeros(32), torch.zeros(32), 32, 16), {"num_stages": 2}),
    ],
)
def test_a_launch_that_is_compiled_for_something_else_is_not_known(launched, args, options):
    through, past = launched
    doubled[(2,)](torch.zeros(32), torch.zeros(32), 32, 16, num_warps=2)
    doubled[(2,)](*args, **options)
    assert (len(through), len(past)) == (2, 0)


def test_another_device_is_launched_on_through_triton(launched, monkeypatch):
    through, past = launched
    args = torch.zeros(32), torch.zeros(32), 32, 16
    doubled[(2,)](*args)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 4)
    doubled[(2,)](*args)
    assert (len(through), len(past)) == (2, 0)
    doubled[(2,)](*args)
    assert past[0][3] == 74


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_told_by_triton(launched, hook):
    through, past = launched
    args = torch.zeros(32), torch.zeros(32), 32, 16
    doubled[(2,)](*args)

    def told(metadata):
        pass

    getattr(knobs.runtime, hook).add(told)
    try:
        doubled[(2,)](*args)
    finally:
        getattr(knobs.runtime, hook).remove(told)
    assert (len(through), len(past)) == (2, 0)


def test_what_a_hook_keeps_from_being_compiled_is_not_kept(launched, monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    args = torch.zeros(32), torch.zeros(32), 32, 16
    for _ in range(2):
        assert doubled[(2,)](*args) is None


WITH_KERNELS = [m for m in ops.ALL if m.kernel]


@pytest.mark.parametrize("module", WITH_KERNELS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_kernel_of_an_op_is_known_when_it_is_launched_again(module, launched, monkeypatch):
    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(blocks, "runs_native", lambda x: False)
    monkeypatch.setattr(device, "capability", lambda x: (9, 0))
    monkeypatch.setattr(device, "processors", lambda x: 132)
    monkeypatch.setattr(device, "shared_memory", lambda x: 2**17)
    through, past = launched
    for args in filter(_is_matrix, module.samples("cpu")):
        module.launch(*args)
        if through:
            break
    first = len(through)
    assert first
    module.launch(*args)
    assert (len(through), len(past)) == (first, first)


def _is_matrix(args):
    x = args[0][0] if isinstance(args[0], list) else args[0]
    return min(x.shape) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 15, 16, 1000, 1024])
@pytest.mark.parametrize(("into", "of"), list(itertools.product(range(3), repeat=2)))
def test_sizes_and_places_that_follow_each_other_are_each_right(n, into, of):
    x = torch.arange(1030, device="cuda", dtype=torch.bfloat16)
    for skip_x, skip_y, size in ((0, 0, 1024), (of, into, n), (into, of, n)):
        y = torch.zeros(1030, device="cuda", dtype=torch.bfloat16)
        doubled[(1,)](x[skip_x:], y[skip_y:], size, 1024)
        expected = torch.zeros_like(y)
        expected[skip_y : skip_y + size] = x[skip_x : skip_x + size] * 2
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_a_tensor_on_the_cpu_is_refused_when_the_kernel_is_known_too():
    x = torch.ones(16, device="cuda")
    for _ in range(2):
        doubled[(1,)](x, x, 16, 16)
    with pytest.raises(ValueError, match="cpu tensor"):
        doubled[(1,)](torch.ones(16), x, 16, 16)


@pytest.mark.gpu
def test_a_known_kernel_runs_on_the_current_stream_and_in_a_graph():
    x, y = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
    doubled[(1,)](x, y, 1024, 1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled[(1,)](x, y, 1024, 1024)
        doubled[(1,)](y, y, 1024, 1024)
    x.fill_(3)
    graph.replay()
    assert torch.equal(y, torch.full_like(y, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "nvfp4"])
def test_a_second_step_launches_nothing_through_triton(monkeypatch, recipe):
    model, x = bf16(FFN(), "cuda"), data(32, 64, device="cuda")
    model.compile(backend=lowprec_eager, options={"recipe": recipe, "rewrite": "all"})
    through, run = [], JITFunction.run
    for module in ops.ALL:
        getattr(module.kernel, "_kept", {}).clear()

    def watched(kernel, *args, **options):
        through.append(kernel.fn.__module__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", watched)
    model(x).sum().backward()
    assert through
    through.clear()
    model(x).sum().backward()
    assert through == []
