"""Groups of rows, as every grouped op reads them."""

import pytest
import torch

from lpcompile import ops
from lpcompile.errors import ShapeError


@pytest.mark.parametrize(
    "op",
    [
        ops.amax_column_grouped.op,
        ops.amax_tensor_grouped.op,
        lambda x, offs: ops.amax_group.op(x, offs, None),
        lambda x, offs: ops.quantize_fp8_block_grouped_t.op(x, offs, torch.float8_e4m3fn, True),
    ],
)
def test_groups_of_another_tensor_are_refused(op):
    with pytest.raises(ShapeError, match="end at row 9 in a tensor of 5"):
        op(torch.randn(5, 16).bfloat16(), torch.tensor([4, 9], dtype=torch.int32))
