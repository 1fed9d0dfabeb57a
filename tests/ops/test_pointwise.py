"""What a pointwise program computes on a GPU, against fp64; and programs made one."""

import pytest
import torch

from lpcompile import ops
from lpcompile.ops import pointwise

EXP = "full; float v0 = i0; float v1 = neg(v0); float v2 = exp(v1)"
PROGRAMS = {
    "exp": (f"{EXP}; bf16 v3 = v2; v3", lambda x: (-x).exp()),
    "sigmoid": ("full; float v0 = i0; bf16 v1 = sigmoid(v0); v1", torch.sigmoid),
    "silu": (
        f"{EXP}; float v3 = add(v2, 1.0); bf16 v4 = div(v0, v3); v4",
        lambda x: x * x.sigmoid(),
    ),
}
SMALLEST = 2.0**-126  # what is smaller may be 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_of_every_bf16_number_the_function_is_right_to_a_place_of_bf16(name):
    program, function = PROGRAMS[name]
    every = torch.arange(2**16, dtype=torch.int32, device="cuda").short().view(torch.bfloat16)
    x = every[:, None].expand(-1, 64).contiguous()
    (made,) = ops.fused_amax.op([x], program, ["row0"])  # the magnitude of what a row is full of
    expected = function(every.double()).abs()
    rounded = expected.to(torch.bfloat16).float()
    assert torch.equal(made.isnan(), expected.isnan())
    places = (made.view(torch.int32) - rounded.view(torch.int32)).abs() >> 16
    far = (places > 1) & ~made.isnan() & (expected > SMALLEST * (1 + every.double().abs()))
    assert every[far].tolist() == []
    assert (places[~made.isnan() & (expected > 1e-30)] > 0).double().mean() < 0.001


def test_joined_programs_compute_what_each_did_and_what_they_share_once():
    gate, up, dh = torch.randn(3, 16, 32).bfloat16().unbind()
    silu = f"full {EXP}; float v3 = add(v2, 1.0); bf16 v4 = div(v0, v3)"
    h = pointwise.parse(f"{silu}; bf16 v5 = mul(v4, i1); v5")  # of (gate, up)
    dup = pointwise.parse(f"{silu}; bf16 v5 = mul(i1, v4); v5")  # of (gate, dh)
    both = pointwise.parse("full full full; bf16 v0 = mul(i2, i1); i0+v0 i1")  # of (up, gate, dh)
    parts = [(h, (gate, up)), (dup, (gate, dh)), (both, (up, gate, dh))]
    program, inputs = pointwise.join(parts)
    assert [id(i) for i in inputs] == [id(gate), id(up), id(dh)]
    assert len(program.statements) == 5 + 1 + 1 + 1
    expected = [x for one, given in parts for x in pointwise.run(one, list(given))]
    made = pointwise.run(pointwise.parse(program.text()), inputs)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert len(made) == len(expected) == 4
