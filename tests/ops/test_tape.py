"""Launches called again from their tapes: on which tensors, with which places, and when not."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import knobs
from triton.runtime.jit import JITFunction

from lpcompile import ops
from lpcompile.ops import blocks, device, fp8, tape
from lpcompile.ops.define import same_bits
from lpcompile.ops.launcher import Descriptor, cached

SCHEMA = torch._C.parse_schema(
    "op(Tensor x, Tensor[] more, bool flag, str[] names, Tensor? last) -> Tensor"
)
FACTOR = torch.full((), 3.0)
STREAM, DEVICE = 7, -1  # of a tensor on the CPU


@cached
@triton.jit
def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    pass


class Launch:
    """A launch that counts its calls, and what Inductor's code would call."""

    def __init__(self, launch):
        self.calls, self.launch = 0, launch
        self.call = tape.played(SimpleNamespace(_schema=SCHEMA), self)

    def __call__(self, x, more, flag=False, names=(), last=None):
        self.calls += 1
        return self.launch(x, more, flag, names, last)


@pytest.fixture
def gpu(monkeypatch):
    """Tapes of tensors on the CPU; what Triton's launcher would be given is noted."""
    given = []
    compiled = SimpleNamespace(run=lambda *args: given.append(args), function=1, packed_metadata=2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: DEVICE, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: STREAM, raising=False)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: compiled)
    yield given
    for launched in {kernel, *(m.kernel for m in ops.ALL)}:
        getattr(launched, "_kept", {}).clear()


def recorded(launch, *args):
    """A launch after two calls with these arguments: the next one like them is the tape's."""
    watched = Launch(launch)
    for _ in range(2):
        watched.call(*args)
    watched.calls = 0
    return watched


def everything(x, more, flag, names, last):
    """An allocation, views with an offset and of another type, a kernel, what aten computes."""
    out = x.new_zeros(4, 8)
    kernel[(2, 3)](x[2:], out.view(torch.int32)[1], 32, 16, num_warps=2)
    product = torch.mm(x.t(), more[0])
    torch.mm(x, x.t(), out=(square := x.new_empty(8, 8)))
    return [product[:, 1:], out, x.mT, product.view(torch.int32).t(), square]


def arguments():
    return torch.randn(8, 4), [torch.randn(8, 4)]


def test_the_third_call_computes_without_the_launch(gpu):
    watched = recorded(everything, *arguments())
    args = arguments()
    made, expected = watched.call(*args), everything(*args, False, [], None)
    assert watched.calls == 0
    assert same_bits(made, expected) == ""
    assert [m.stride() for m in made] == [e.stride() for e in expected]
    assert made[2].data_ptr() == args[0].data_ptr()


def test_kernels_are_given_places_of_arguments_and_of_what_is_allocated(gpu):
    watched = recorded(everything, *arguments())
    del gpu[:]
    x, more = arguments()
    made = watched.call(x, more)
    places = x.data_ptr() + 2 * 4 * 4, made[1].data_ptr() + 8 * 4
    assert gpu == [(2, 3, 1, STREAM, 1, 2, None, None, None, *places, 32, 16)]


def test_a_descriptor_is_of_where_the_tensor_lies(gpu):
    if not Descriptor:
        pytest.skip("a Triton without them")
    from lpcompile.ops import wgmma

    def launch(x, *_):
        out = torch.empty_like(x)
        tiles = wgmma._descriptor(x[8:], [64, 64])
        kernel[(1,)](tiles, out, 32, 16)
        return out

    watched = recorded(launch, torch.randn(128, 64), [])
    first, x = gpu[-1][9], torch.randn(128, 64)
    watched.call(x, [])
    made = gpu[-1][9]
    assert watched.calls == 0
    assert made.base.data_ptr() == x.data_ptr() + 8 * 64 * 4
    fields = "shape", "strides", "block_shape", "layout", "padding"
    assert [getattr(made, f) for f in fields] == [getattr(first, f) for f in fields]


def test_zeros_are_written_at_every_call(gpu):
    def launch(x, *_):
        each = [torch.empty_like(x) for _ in range(2)]
        torch._foreach_zero_(each)
        return (x.new_zeros(4), torch.empty_like(x).zero_(), *each)

    watched = recorded(launch, torch.ones(4), [])
    for _ in range(3):
        for made in watched.call(torch.ones(4), []):
            assert torch.equal(made, torch.zeros(4))
            made.fill_(5)
    assert watched.calls == 0


def test_one_tensor_in_two_places_stands_for_two(gpu):
    x = torch.randn(16)
    watched = recorded(lambda x, more, *_: x - more[0], x, [x])
    assert torch.equal(watched.call(x, [x + 1]), x - (x + 1))
    assert watched.calls == 0


@pytest.mark.parametrize(
    ("other", "given"),
    [
        ("a size", (torch.ones(4, 8), [torch.ones(8)])),
        ("strides", (torch.ones(8, 8).t()[:, ::2], [torch.ones(8)])),
        ("a type", (torch.ones(8, 4, dtype=torch.int32), [torch.ones(8)])),
        ("how many", (torch.ones(8, 4), [torch.ones(8), torch.ones(8)])),
        ("a flag", (torch.ones(8, 4), [torch.ones(8)], True)),
        ("names", (torch.ones(8, 4), [torch.ones(8)], False, ["a"])),
        ("what is optional", (torch.ones(8, 4), [torch.ones(8)], False, [], torch.ones(1))),
        ("a place", (torch.ones(33)[1:].view(8, 4), [torch.ones(8)])),
        ("another place", (torch.ones(8, 4), [torch.ones(9)[1:]])),
    ],
)
def test_other_arguments_are_launched(gpu, other, given):
    watched = recorded(lambda x, *_: x + 1, torch.ones(8, 4), [torch.ones(8)])
    watched.call(torch.zeros(8, 4), [torch.ones(8)])
    assert watched.calls == 0
    watched.call(*given)
    assert watched.calls == 1, other


def test_another_device_is_launched(gpu, monkeypatch):
    watched = recorded(lambda x, *_: x + 1, torch.ones(8), [])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3)
    watched.call(torch.ones(8), [])
    assert watched.calls == 1


@pytest.mark.parametrize(
    "launch",
    [
        lambda x, *_: x + FACTOR,
        lambda x, *_: x + x.sum().item(),
        lambda x, *_: x + 1 if x.any() else x,
        lambda x, *_: torch.empty_like(x).copy_(x),
        lambda x, *_: x.unbind()[0] * 1,
        lambda x, *_: x * (kernel[(1,)](FACTOR, x, 1, 16) is None),
    ],
    ids=["a constant", "a number", "a branch", "a copy", "a tuple", "a constant in a kernel"],
)
def test_what_a_tape_cannot_say_is_launched(gpu, launch):
    watched = recorded(launch, torch.ones(4), [])
    watched.call(torch.ones(4), [])
    assert watched.calls == 1


def test_an_op_that_a_launch_calls_launches_its_own_kernels(gpu):
    def inner(x):
        kernel[(1,)](x, x, 16, 16)
        return x * 2

    library = torch.library.Library("lpcompile_test_tape", "DEF")
    library.define("dequantize(Tensor x) -> Tensor")  # torch has a function of that name
    library.impl("dequantize", inner, "CPU")
    op = torch.ops.lpcompile_test_tape.dequantize
    watched = recorded(lambda x, *_: op(x) + 1, torch.ones(16), [])
    gpu.clear()
    assert torch.equal(watched.call(torch.full((16,), 3.0), []), torch.full((16,), 7.0))
    assert (watched.calls, len(gpu)) == (0, 1)


def test_a_kernel_that_triton_launches_is_on_no_tape(gpu):
    def launch(x, *_):
        kernel[(1,)](x, x, 8.5, 16)  # of a type that the launcher does not know
        return x * 1

    watched = recorded(launch, torch.ones(4), [])
    watched.call(torch.ones(4), [])
    assert watched.calls == 1


def test_who_is_told_of_launches_is_told_of_every_one(gpu):
    watched = recorded(everything, *arguments())

    def hook(metadata):
        pass

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        watched.call(*arguments())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert watched.calls == 1
    watched.call(*arguments())
    assert watched.calls == 1


def test_what_another_thread_launches_meanwhile_is_not_recorded(gpu):
    x = torch.ones(16)

    def launch(y, *_):
        other = threading.Thread(target=lambda: kernel[(1,)](x, x, 16, 16))
        other.start()
        other.join()
        kernel[(1,)](y, y, 16, 16)
        return y * 1

    watched = recorded(launch, torch.ones(16), [])
    del gpu[:]
    y = torch.ones(16)
    watched.call(y, [])
    assert watched.calls == 0
    assert [given[9:11] for given in gpu] == [(y.data_ptr(), y.data_ptr())]


def test_a_tape_keeps_no_tensor_alive(gpu):
    args = arguments()
    watched = recorded(everything, *args)
    made = watched.call(*args)
    memory = [StorageWeakRef(x.untyped_storage()) for x in (args[0], args[1][0], *made)]
    assert not any(ref.expired() for ref in memory)
    del args, made
    gc.collect()
    assert all(ref.expired() for ref in memory)


def test_the_tapes_of_an_op_have_an_end(gpu, monkeypatch):
    monkeypatch.setattr(tape, "MOST", 4)
    watched = recorded(lambda x, *_: x + 1, torch.ones(1), [])
    for n in range(2, 6):
        watched.call(torch.ones(n), [])
    watched.calls = 0
    watched.call(torch.ones(1), [])
    assert watched.calls == 1


def test_a_tape_makes_no_graph_of_gradients(gpu):
    x = torch.ones(4, requires_grad=True)
    watched = recorded(lambda x, *_: x * 2, x, [])
    assert not watched.call(x, []).requires_grad
    assert watched.calls == 0


def short(module):
    return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_the_reference_of_an_op_makes_the_same_bits_from_its_tape(gpu, module):
    call = tape.played(module.op, module.reference)
    for args in module.samples("cpu"):
        made = [call(*args) for _ in range(3)][-1]
        assert same_bits(made, module.reference(*args)) == ""


@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_the_kernels_of_an_op_get_from_its_tape_what_its_launch_gives_them(
    gpu, module, monkeypatch
):
    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(blocks, "runs_native", lambda x: False)
    monkeypatch.setattr(device, "capability", lambda x: (9, 0))
    monkeypatch.setattr(device, "processors", lambda x: 132)
    monkeypatch.setattr(device, "shared_memory", lambda x: 2**17)
    call, compared = tape.played(module.op, module.launch), 0
    for args in module.samples("cpu"):
        try:
            made = module.launch(*args)
        except (RuntimeError, ValueError):  # what aten multiplies on a GPU alone
            continue
        for _ in range(2):
            call(*args)
        given = []
        for launch in (module.launch, call):
            gpu.clear()
            made = launch(*args)
            given.append([[place(x, (args, made)) for x in kernel] for kernel in gpu])
        assert given[0] == given[1]
        compared += len(given[0])
    assert compared


def place(x, tensors):
    """What a kernel is given; of a number that is in a tensor's memory which, and where in it."""
    if isinstance(x, Descriptor):
        return [place(x.base.data_ptr(), tensors), x.shape, x.strides, x.block_shape]
    if type(x) is not int or x < 2**32:
        return x
    for i, t in enumerate(t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)):
        begin = t.untyped_storage().data_ptr()
        if begin <= x < begin + t.untyped_storage().nbytes():
            return i, x - begin
    return "in between"


def test_without_the_launcher_no_launch_is_recorded(gpu, monkeypatch):
    monkeypatch.setattr(tape.launcher, "KNOWN", False)
    watched = recorded(lambda x, *_: x + 1, torch.ones(4), [])
    watched.call(torch.ones(4), [])
    assert watched.calls == 1


def test_a_tape_drops_what_it_has_read_for_the_last_time(gpu):
    refs = []

    def probe(x):
        refs.append(StorageWeakRef(x.untyped_storage()))
        return x * 2

    library = torch.library.Library("lpcompile_test_drop", "DEF")
    library.define("probe(Tensor x) -> Tensor")
    library.impl("probe", probe, "CPU")
    op = torch.ops.lpcompile_test_drop.probe
    expired = []

    def last(x):
        expired.append(refs[-1].expired())
        return x + 1

    library.define("last(Tensor x) -> Tensor")
    library.impl("last", last, "CPU")

    def launch(x, *_):
        return torch.ops.lpcompile_test_drop.last(op(x + 1))

    watched = recorded(launch, torch.ones(64), [])
    watched.call(torch.ones(64), [])
    assert watched.calls == 0
    assert expired[-1]


def elsewhere(x):
    """A tensor of the same bits and strides in other memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("module", ops.ALL, ids=short)
def test_an_op_makes_the_same_bits_from_its_tape(module):
    for args in module.samples("cuda")[::3]:  # a kernel each; their bits are the contract's
        module.launch(*args)  # compiles
        _, play = tape.record(module.launch, args, torch.cuda.current_device())
        args = tree_map_only(torch.Tensor, elsewhere, args)
        made = play(*args) if play else None
        if made is not None:  # not refused
            assert same_bits(made, module.op(*args)) == ""
