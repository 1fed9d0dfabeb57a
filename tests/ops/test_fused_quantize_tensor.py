"""Programs that wait for each other: on several streams, in a captured graph; and their scales."""

import pytest
import torch

from lpcompile import ops
from lpcompile.ops.define import same_bits

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAGNITUDES = torch.arange(0x7F81, dtype=torch.int16).view(torch.bfloat16)  # up to Inf


def experts():
    scale = torch.rand(48, 1, 1, device="cuda", dtype=torch.bfloat16)
    return torch.randn(48, 1408, 512, device="cuda", dtype=torch.bfloat16) * scale


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("element", [E4M3, E5M2])
def test_every_magnitude_has_the_scale_of_the_formula(element, device):
    x = MAGNITUDES.to(device)[:, None, None].expand(-1, 1, 16).contiguous()
    amax = MAGNITUDES.float().double().clamp(min=1e-12)
    encode = (torch.full_like(amax, 448.0 if element is E4M3 else 57344.0) / amax).float()
    encode[~MAGNITUDES.isfinite()] = torch.nan
    args = (x, MAGNITUDES.to(device).float(), element, False)
    for made in (
        ops.quantize_fp8_tensor.op(*args)[1],
        ops.fused_quantize_tensor.op(x, element, False)[1],
    ):
        finite = encode.isfinite()
        assert same_bits(made.cpu()[finite], (1 / encode)[finite]) == ""
        assert made.cpu()[~finite].isnan().all()


@pytest.mark.gpu
def test_launches_on_several_streams_wait_for_their_own_programs_alone():
    inputs = [experts() for _ in range(3)]
    expected = [ops.fused_quantize_tensor.reference(x, E4M3, False) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    made = []
    for _ in range(20):
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                made.append(ops.fused_quantize_tensor.op(x, E4M3, False))
    torch.cuda.synchronize()
    assert [i for i, m in enumerate(made) if same_bits(m, expected[i % len(inputs)])] == []


@pytest.mark.gpu
def test_a_captured_launch_starts_from_nothing_each_time():
    x = experts()
    ops.fused_quantize_tensor.op(x, E4M3, False)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = ops.fused_quantize_tensor.op(x, E4M3, False)
    for factor in (1.0, 0.25, 8.0):
        x *= factor
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(made, ops.fused_quantize_tensor.reference(x, E4M3, False)) == ""
