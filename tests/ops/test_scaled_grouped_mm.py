"""What a grouped GEMM adds to its product; its shapes and scales are in test_grouped."""

import pytest

from lpcompile import ops
from lpcompile.ops.define import same_bits


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_addend_is_added_to_what_was_rounded(device):
    added = [args for args in ops.scaled_grouped_mm.samples(device) if len(args) == 10]
    assert len(added) == 9
    for *args, addend in added:
        made = ops.scaled_grouped_mm.op(*args, addend)
        assert same_bits(made, ops.scaled_grouped_mm.op(*args) + addend) == ""
