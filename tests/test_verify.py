"""The verifier names the node and the pass of every graph that is broken on purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import lpcompile
from lpcompile import ops, verify
from lpcompile.errors import VerifyError
from lpcompile.graph import BACKWARD, CASTS

QUANTIZE, QUANTIZE_T = ops.quantize_fp8_row.op, ops.quantize_fp8_row_t.op
PRODUCT = ops.scaled_mm.op


def run(f=F.linear, dtype=torch.bfloat16):
    """Compile f(x, w), forward and backward, every pass verified."""
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(48, 64, dtype=dtype))
    options = {"rewrite": "all", "codegen": "eager", "verify": True}
    torch.compile(f, backend="lowprec", options=options)(x, w).sum().backward()


def problem(f=F.linear, dtype=torch.bfloat16):
    """What the VerifyError says that compiling f raises."""
    with pytest.raises(BackendCompilerFailed) as raised:
        run(f, dtype)
    assert isinstance(raised.value.inner_exception, VerifyError)
    return str(raised.value.inner_exception)


@pytest.fixture
def broken(monkeypatch):
    """A function that changes the joint graph after pass linear, before it is verified."""

    def breaks(change):
        check = verify.passed

        def passed(graph, name, before, leaves=None):
            if name == "linear":
                change(graph)
            check(graph, name, before, leaves)

        monkeypatch.setattr(verify, "passed", passed)

    return breaks


def first(graph, target):
    """The first call of an op."""
    return next(n for n in graph.nodes if n.target is target)


def test_an_argument_that_changes_what_is_made_is_found(broken):
    def change(graph):
        product = first(graph, PRODUCT)
        product.update_arg(4, torch.float32)

    broken(change)
    message = problem()
    assert "after pass 'linear': mm = lpcompile.scaled_mm.default is torch.bfloat16 [32, 48]" in (
        message
    )
    assert "its op makes torch.float32 [32, 48]" in message


def test_a_stride_that_an_op_does_not_make_is_found(broken):
    def change(graph):
        product = first(graph, PRODUCT)
        product.meta["val"] = product.meta["val"].t().contiguous().t()

    broken(change)
    assert "of strides [1, 32], and its op makes" in problem()


def test_a_part_that_is_not_what_the_quantize_makes_is_found(broken):
    def change(graph):
        values = next(n for n in graph.nodes if n.name == "values")
        values.meta["val"] = values.meta["val"].to(torch.float8_e5m2)

    broken(change)
    assert "values is torch.float8_e5m2 [32, 64]" in problem()


def test_operands_that_an_op_does_not_take_are_found(broken):
    def change(graph):
        add = graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)[0]
        with graph.inserting_after(add):
            mm = graph.call_function(torch.ops.aten.mm.default, (add, add))
        mm.meta = dict(add.meta)
        graph.output_node().update_arg(0, [mm, *graph.output_node().args[0][1:]])

    def twice(x, w):
        return F.linear(x, w).sum(1, keepdim=True).expand(32, 48)

    broken(change)
    assert "does not take its inputs" in problem(twice)


def test_an_output_that_changes_is_found(broken):
    def change(graph):
        output = graph.output_node()
        y = output.args[0][0]
        with graph.inserting_before(output):
            wide = graph.call_function(torch.ops.aten.to.dtype, (y, torch.float32))
        wide.meta = {**y.meta, "val": y.meta["val"].float()}
        output.update_arg(0, [wide, *output.args[0][1:]])

    broken(change)
    assert "output 0 of the graph is torch.float32 [32, 48] of strides [48, 1], it was" in problem()


def test_a_quantize_that_nobody_reads_is_found(broken):
    def change(graph):
        quantize = first(graph, QUANTIZE)
        with graph.inserting_after(quantize):
            graph.node_copy(quantize).name = "unread"

    broken(change)
    assert "nobody reads what unread = lpcompile.quantize_fp8_row.default makes" in problem()


def test_a_weight_that_is_narrowed_for_the_backward_in_the_forward_is_found(broken):
    def change(graph):
        for node in graph.find_nodes(op="placeholder", sort=True)[1].users:
            if node.target in (ops.amax_column.op, QUANTIZE_T):
                node.meta["partitioner_tag"] = "is_forward"

    broken(change)
    assert "narrows a weight for the backward alone, its partitioner_tag is 'is_forward'" in (
        problem()
    )


def test_a_weight_that_is_narrowed_for_the_forward_in_the_backward_is_found(broken):
    def change(graph):
        product = first(graph, PRODUCT)
        product.args[2].args[0].meta["partitioner_tag"] = BACKWARD

    broken(change)
    assert "narrows a weight for the forward and is tagged" in problem()


@pytest.mark.parametrize("key", ["seq_nr", "partitioner_tag"])
def test_a_product_without_the_meta_of_its_gemm_is_found(broken, key):
    broken(lambda graph: first(graph, PRODUCT).meta.pop(key))
    assert f"mm = lpcompile.scaled_mm.default has another {key} than the call" in problem()


def test_a_quantize_without_the_meta_of_its_product_is_found(broken):
    broken(lambda graph: first(graph, QUANTIZE).meta.pop("seq_nr"))
    assert "quantize_fp8_row = lpcompile.quantize_fp8_row.default has another seq_nr" in problem()


def both_ways(x, w):
    return torch.tanh(x @ w.T) @ w


def autocast_both_ways(x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return both_ways(x, w)


def test_a_weight_that_both_directions_narrow_alike_is_not_saved():
    run(both_ways)


def test_a_master_weight_that_both_directions_narrow_alike_is_not_saved():
    run(autocast_both_ways, torch.float32)


def test_a_master_weight_whose_first_linear_has_no_dgrad_is_not_saved():
    def twice(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.tanh(F.linear(x.detach(), w))
            return F.linear(F.pad(h, (0, 16)), w)

    run(twice, torch.float32)


def test_a_narrow_copy_of_a_weight_that_is_saved_is_found(broken):
    def change(graph):
        for node in graph.nodes:
            if node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE:
                del node.meta["recompute"]

    broken(change)
    assert "is saved for the backward, and quantize_fp8_row" in problem(both_ways)


def checkpointed(x, w):
    for _ in range(2):
        x = checkpoint(both_ways, x, w, use_reentrant=False)
    return x


def test_a_weight_of_two_checkpointed_regions_is_not_saved():
    run(checkpointed)


def autocast(x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, w)


def test_a_cast_of_a_master_weight_that_is_saved_for_a_quantize_is_found(broken):
    run(autocast, torch.float32)

    def change(graph):
        for node in graph.nodes:
            if node.target in CASTS:
                node.meta.update(recompute=CheckpointPolicy.MUST_SAVE, ac_graph_id=0)

    torch._dynamo.reset()
    broken(change)
    message = problem(autocast, torch.float32)
    assert "after partitioning" in message
    assert "is a copy of the weight primals_2" in message


def test_ops_that_the_user_called_are_not_held_to_what_passes_promise():
    def both(x, w):
        return F.linear(torch.tanh(lpcompile.linear(x, w[:, :64])), w[:, :48])

    run(both)
    run(lpcompile.linear)
