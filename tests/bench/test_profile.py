"""What a profile says of every kernel, in tables and in a picture."""

import pytest
import torch

from lpcompile.__main__ import main
from lpcompile.bench import models, profile, report

EAGER = '{"codegen": "eager", "rewrite": "all"}'


def run(tmp_path, *arguments):
    """The summary and the listing of a profile on the CPU."""
    out = tmp_path / "out.json"
    how = "--device", "cpu", "--options", EAGER, "--no-peers", "--json", str(out)
    assert main(["bench", "profile", *arguments, *how]) == 0
    return report.load([out])


def test_a_profile_says_what_each_kernel_is(tmp_path):
    summary, listing = run(tmp_path, "--model", "tiny", "--recipes", "fp8_rowwise")
    count = {(r["variant"], r["kind"]): r["kernels"] for r in summary.rows}
    num_gemms = 3 * len(models.linears(models.LLAMAS["tiny"], "block"))
    assert count["bf16", "GEMM"] == num_gemms
    assert count["fp8_rowwise", "GEMM"] == num_gemms
    assert count["bf16", "quantize"] == 0
    assert count["fp8_rowwise", "quantize"] > num_gemms
    assert count["bf16", "attention"] > 0
    assert len(listing.rows) == count["bf16", "all"] + count["fp8_rowwise", "all"]


def test_a_picture_has_the_color_of_every_kind_of_kernel_in_it(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    colors = pytest.importorskip("matplotlib.colors")
    ran = {
        "bf16": [profile.Kernel("gemm", "", 0, 2.0), profile.Kernel("flash", "", 2, 1.0)],
        "fp8": [profile.Kernel("", "lpcompile::quantize", 0, 1.0)],
    }
    profile.picture(ran, tmp_path / "kernels.png")
    pixels = torch.from_numpy(image.imread(tmp_path / "kernels.png")[..., :3])
    area = {}
    for kind in ("GEMM", "attention", "quantize", "fused"):
        color = torch.tensor(colors.to_rgb(profile.COLORS[kind]))
        area[kind] = int(((pixels - color).abs().amax(-1) < 0.01).sum())
    assert area["GEMM"] > 1.5 * area["attention"] > 3 * area["fused"]
    assert area["quantize"] > 3 * area["fused"]


@pytest.mark.parametrize(
    ("op", "kernel", "kind"),
    [
        ("aten::mm", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("lpcompile::scaled_mm", "void cutlass::device_kernel<at::cuda::detail...>", "GEMM"),
        ("aten::_scaled_dot_product_flash_attention", "void flash_fwd_kernel<...>", "attention"),
        ("aten::_cudnn_attention_backward", "cudnn_generated_fort_native_sdpa_sm90", "attention"),
        ("lpcompile::quantize_fp8_row_t", "kernel", "quantize"),
        ("", "triton_red_fused__fused_rms_norm_quantize_fp8_row_0", "fused"),
        ("", "triton_poi_fused_mul_silu_1", "other"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart_by_name_and_op(op, kernel, kind):
    assert profile.Kernel(kernel, op, 0, 1).kind == kind


def test_a_profile_of_experts_has_their_nine_products(tmp_path):
    arguments = "--part", "experts", "--model", "tiny", "--recipes", "fp8_rowwise"
    summary, _ = run(tmp_path, *arguments)
    counted = [r["kernels"] for r in summary.rows if r["kind"] == "GEMM"]
    assert counted == [9, 9]
