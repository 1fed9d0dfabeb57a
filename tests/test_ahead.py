"""Kernels compiled beside Inductor's: which, by whom, and that nothing runs meanwhile."""

import threading
from concurrent.futures import Future

import pytest
import torch
from oracle import FFN, bf16, data
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from lpcompile import ahead, ops
from lpcompile.ops import blocks, device, fp8, pointwise


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe", ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4"]
)
def test_no_kernel_of_a_graph_is_compiled_at_its_first_call(monkeypatch, recipe):
    threads, whole = [], JITFunction._do_compile

    def watched(self, *args, **kwargs):
        threads.append((self.fn.__module__, threading.current_thread().name))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", watched)
    # Sizes that nobody else has, or the kernels would be there already.
    model, x = bf16(FFN(208, 1232), "cuda"), data(1360, 208, device="cuda")
    options = {"recipe": recipe, "rewrite": "all"}
    with torch._inductor.config.patch(force_disable_caches=True):  # on a hit no pass runs
        torch.compile(model, backend="lowprec", options=options)(x).sum().backward()
    assert threads, "nothing of ours was compiled"
    late = [name for name, thread in threads if not thread.startswith("lpcompile-launch")]
    assert late == []


def quantized(device):
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(64, 96, device=device, dtype=torch.bfloat16)
    node = graph.call_function(ops.quantize_fp8_row.op, (x, torch.float8_e4m3fn, True))
    graph.output(node)
    return graph, node


def test_a_graph_on_the_cpu_starts_nothing():
    assert ahead.start(quantized("cpu")[0]) == []


@pytest.mark.gpu
def test_a_launch_has_the_sizes_and_the_place_of_the_op():
    _, node = quantized("cuda")
    launch, (x, element, pow2), kwargs = ahead._launch(node, FakeTensorMode())
    assert launch is ops.quantize_fp8_row.launch
    assert (x.shape, x.stride(), x.device.type) == ((64, 96), (96, 1), "cuda")
    assert (element, pow2, kwargs) == (torch.float8_e4m3fn, True, {})


@pytest.mark.parametrize(
    "module", [m for m in ops.ALL if m.kernel], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_every_op_comes_to_its_kernels_on_fake_tensors(module, monkeypatch):
    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(blocks, "runs_native", lambda x: False)
    monkeypatch.setattr(device, "capability", lambda x: (9, 0))
    monkeypatch.setattr(device, "processors", lambda x: 132)
    monkeypatch.setattr(device, "shared_memory", lambda x: 2**17)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: kernel)
    pointwise.keeps_zero.cache_clear()
    getattr(module.kernel, "cache_clear", lambda: None)()  # of those that are generated
    samples = [a for a in module.samples("cpu") if all(t.numel() for t in tree_leaves(a[0]))]
    mode = FakeTensorMode()
    fakes = [tree_map_only(torch.Tensor, mode.from_tensor, args) for args in samples[:8]]
    with ahead._instead_of_running() as kernels, mode:
        for args in fakes:
            module.launch(*args)
    assert kernels


def test_what_fails_ahead_is_left_to_its_first_call():
    def broken():
        raise RuntimeError("no such kernel")

    assert not ahead._attempt(broken)
    assert ahead._attempt(lambda: None)


def test_only_the_thread_that_compiles_does_not_run(monkeypatch):
    ran = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup: ran.append(warmup))
    run = JITFunction.run
    with ahead._instead_of_running() as kernels:
        JITFunction.run(None, 1, grid=(1,), warmup=False)
        other = threading.Thread(target=lambda: JITFunction.run(None, 2, grid=(1,), warmup=False))
        other.start()
        other.join()
    assert ran == [True, False]
    assert len(kernels) == 1
    assert JITFunction.run is run


def test_a_machine_out_of_threads_compiles_all_the_same(monkeypatch):
    def full(graph):
        failed = Future()
        failed.set_exception(RuntimeError("can't start new thread"))
        return [failed]

    monkeypatch.setattr(ahead, "start", full)
    model, x = bf16(FFN()), data(32, 64)
    with torch._inductor.config.patch(force_disable_caches=True):  # on a hit no pass runs
        y = torch.compile(model, backend="lowprec", options={"rewrite": "all"})(x)
    assert y.shape == x.shape


def test_where_a_fake_tensor_lies_is_aligned_and_no_warning(recwarn):
    with FakeTensorMode():
        x = torch.empty(4)
    with ahead._instead_of_running():
        assert x.data_ptr() == 0
    assert not recwarn.list
    assert torch.ones(1).data_ptr() != 0
