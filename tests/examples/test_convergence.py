"""Runs of many variants over devices, and how far from bf16 their curves are."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import convergence  # noqa: E402
import corpus  # noqa: E402
import curves  # noqa: E402
import gpt  # noqa: E402
import training  # noqa: E402

from lpcompile import RECIPES  # noqa: E402

SHAPE = gpt.Shape(dim=32, num_layers=1, num_heads=2, num_kv_heads=1, hidden=64, context=32)
RUNS = ["bf16", "fp8_rowwise", "bf16-seed1"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A command line for two processes at a time on the CPU."""
    monkeypatch.setitem(convergence.SIZES, "tiny", training.Size(SHAPE, 4, 20, 3e-3))
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.py").write_text(f"x{i} = {i * i}\n" * 20)
    line = "--size tiny --validate-every 10 --devices cpu,cpu --codegen eager"
    return [*line.split(), "--corpus", str(text), "--out", str(tmp_path / "out")]


def test_runs_in_processes_are_those_of_one_process_and_go_on_where_they_stopped(command, tmp_path):
    line = [*command, "--runs", ",".join(RUNS)]
    convergence.main([*line, "--minutes", "0.02"])  # less than torch's import: one lap is run
    begun = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*-seed*.json")}
    assert sorted(begun) == ["bf16-seed0", "fp8_rowwise-seed0"]
    assert [len(r["run"]["losses"]) for r in begun.values()] == [10, 10]
    made = convergence.main(line)
    plan = convergence.SIZES["tiny"].plan("cpu", "eager", validate_every=10)
    text = corpus.load(str(tmp_path / "text"))
    assert [(c.name, c.seed) for c in made.runs] == [
        ("bf16", 0),
        ("bf16", 1),
        ("fp8_rowwise", 0),
    ]
    for curve in made.runs:
        variant = replace(convergence.VARIANTS[curve.name], seed=curve.seed)
        run = training.train(variant, plan, text, lambda run: None)
        assert curve.validations == pytest.approx(run.validations, abs=1e-6)
        assert curve.validation == curve.validations[-1]
        laps = [sum(run.losses[i : i + 10]) / 10 for i in (0, 10)]
        assert curve.training == pytest.approx(laps, abs=1e-5)
    assert curves.read(tmp_path / "out" / "curves.json") == made


def test_a_run_that_fails_is_named_and_the_others_go_on(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bf16-seed0.json").write_text("not JSON")
    with pytest.raises(SystemExit, match="^failed: bf16-seed0$"):
        convergence.main([*command, "--runs", "bf16,bf16-seed1"])
    assert json.loads((tmp_path / "out" / "bf16-seed1.json").read_text())["run"]["validation"]


def write_environment(path):
    """What this process was started with, whatever has been set since."""
    path.write_bytes(Path("/proc/self/environ").read_bytes())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("seen", "device", "expected"), [(None, "cuda:3", "3"), ("5,2", "cuda:1", "2")]
)
def test_a_process_sees_its_gpu_from_its_first_moment(
    seen, device, expected, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    process = convergence.start(device, write_environment, tmp_path / "environment")
    process.join()
    given = (tmp_path / "environment").read_bytes().split(b"\0")
    assert f"CUDA_VISIBLE_DEVICES={expected}".encode() in given
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--runs nvfp5", "no run 'nvfp5': name one of bf16, fp8_tensorwise"),
        ("--runs nvfp4-seedx", "no run 'nvfp4-seedx'"),
        ("--validate-every 25", "--validate-every is a multiple of 10, at which losses are read"),
        ("--steps 0", "--steps is a multiple of 10"),
        ("--devices tpu:0", "--devices are cpu or cuda:0, cuda:1, ...: got tpu:0"),
        ("--devices cuda:99", "there is no cuda:99 here, only "),
    ],
)
def test_a_flag_that_cannot_be_is_named_with_what_can(flags, message, capsys):
    with pytest.raises(SystemExit):
        convergence.main(flags.split())
    assert message in capsys.readouterr().err


def operands(recipe):
    gemms = {p: getattr(recipe, p) for p in ("fprop", "dgrad", "wgrad")}
    return {f"{p}.{s}": getattr(g, s) for p, g in gemms.items() if g for s in ("lhs", "rhs")}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("nvfp4_no_hadamard", {"wgrad.lhs": "hadamard", "wgrad.rhs": "hadamard"}),
        ("nvfp4_no_stochastic", {"dgrad.lhs": "rounding", "wgrad.lhs": "rounding"}),
        ("nvfp4_weights_1x16", {"fprop.rhs": "block", "dgrad.rhs": "block"}),
    ],
)
def test_an_ablation_changes_one_thing_of_what_it_names(name, changed):
    whole, less = operands(RECIPES["nvfp4"]), operands(convergence.VARIANTS[name].recipe)
    plain = {"hadamard": 0, "rounding": "nearest", "block": (1, 16)}
    assert {where for where in whole if whole[where] != less[where]} == set(changed)
    for where, field in changed.items():
        assert less[where] == replace(whole[where], **{field: plain[field]})


ABOUT = {"machine": "x", "steps": 40, "tokens a step": 1000, "validate_every": 10, "bytes": [1, 1]}


def curve(name, validations, seed=0, training=(1.0, 1.0, 1.0, 1.0), is_cut=False):
    return curves.Curve(
        name, seed, list(training), validations, None if is_cut else validations[-1]
    )


def test_a_run_is_compared_with_the_bf16_of_its_own_seed():
    made = curves.Curves(
        ABOUT,
        [
            curve("bf16", [3.0, 2.0]),
            curve("bf16", [3.0, 2.2], seed=1),
            curve("nvfp4", [3.0, 2.02]),
            curve("nvfp4", [3.0, 2.211], seed=1),
        ],
    )
    first, second = made.runs[2:]
    assert curves.above(first, made.base(first)) == pytest.approx(0.01)
    assert curves.above(second, made.base(second)) == pytest.approx(0.005)
    assert made.base(made.runs[0]) is None
    assert made.band == pytest.approx(0.1)


def test_a_run_that_was_cut_is_compared_where_it_was_cut():
    whole, cut = curve("bf16", [4.0, 3.0, 2.0]), curve("mxfp8", [4.0, 3.003], is_cut=True)
    assert curves.above(cut, whole) == pytest.approx(0.001)
    lines = curves.ends(curves.Curves(ABOUT, [whole, cut]))
    assert "cut after 40 steps" in lines[-1]
    assert "+0.10%" in lines[-1]


def test_a_run_cut_before_anything_can_be_compared_has_a_row_without_numbers():
    whole, cut = curve("bf16", [4.0]), curve("mxfp8", [], training=[4.0], is_cut=True)
    assert math.isnan(curves.above(cut, whole))
    lines = curves.ends(curves.Curves(ABOUT, [whole, cut]))
    assert lines[-1] == "| mxfp8 | 0 | cut after 10 steps |  |  |  |"


def test_the_paired_difference_is_of_the_last_tenth_that_both_have():
    base = curve("bf16", [1.0], training=[9.0] * 18 + [2.0, 2.0, 7.0])
    ours = curve("nvfp4", [1.0], training=[0.0] * 18 + [2.03, 2.01])
    mean, error = curves.paired(ours, base)
    assert mean == pytest.approx(0.01)  # 0.02 of 2
    assert error == pytest.approx(0.005)  # 0.0141 / sqrt(2) of 2


@pytest.mark.parametrize(
    ("name", "difference", "band", "expected"),
    [
        ("mxfp8", 0.003, None, "within 0.3%"),
        ("mxfp8", -0.1, None, "within 0.3%"),
        ("mxfp8", 0.0031, 0.004, "above 0.3%, inside the band"),
        ("mxfp8", 0.0041, 0.004, "**above 0.3%**"),
        ("nvfp4", 0.0149, None, "within 1.5%"),
        ("nvfp4_last_blocks_bf16", 0.0101, None, "**above 1.0%**"),
        ("nvfp4_no_hadamard", 0.5, None, ""),
    ],
)
def test_a_verdict_says_whether_a_run_is_as_near_as_it_should_be(name, difference, band, expected):
    assert curves.verdict(curve(name, [1.0]), difference, band) == expected


def test_every_target_and_every_default_run_is_a_variant():
    assert set(curves.TARGETS) <= set(convergence.VARIANTS)
    names = [convergence.variant_of(run).file for run in convergence.RUNS.split(",")]
    assert len(names) == len(set(names)) == 14


def test_the_document_shows_the_tables_of_the_saved_curves():
    saved = curves.read(ROOT / "docs" / "convergence.json")
    assert curves.tables(saved) in (ROOT / "docs" / "convergence.md").read_text()
