"""The calculations inside the benchmarks."""
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from benchmarks import on_gpu, repetition, run
from benchmarks.bundled import describe
from benchmarks.ratio import parse_ratio, print_ratio
from benchmarks.recipes import tokens_to
from benchmarks.scaling import Law, fit
from common.errors import UserError


def test_the_fit_recovers_the_law_that_generated_the_losses():
    law = Law(2.5, 300.0, 900.0, 0.33, 0.41)
    grids = np.meshgrid(np.geomspace(4e5, 4e6, 4), np.geomspace(2e5, 2e6, 4))
    N, D = (grid.ravel() for grid in grids)
    assert fit(N, D, law.loss(N, D)) == pytest.approx(law, rel=1e-3)
    noise = np.random.default_rng(0).normal(0, 0.01, len(N))
    noisy = fit(N, D, law.loss(N, D) + noise)
    assert noisy.loss(3.5e6, 2e7) == pytest.approx(law.loss(3.5e6, 2e7), abs=0.15)


def test_the_tokens_to_a_loss_are_interpolated_between_the_points_of_a_curve():
    curve = pd.DataFrame({"tokens": [0, 100, 200], "val_loss": [8.0, 6.0, 5.0]})
    assert tokens_to(curve, 6.0) == 100
    assert tokens_to(curve, 5.5) == 150
    assert tokens_to(curve, 4.9) == math.inf


def test_a_printed_ratio_is_parsed_back(capsys):
    print_ratio("int8, 8 streams", [9.6, 9.85, 10.1], "times transformers in float32", "target 8")
    line = capsys.readouterr().out
    assert line == (
        "= int8, 8 streams: 9.85 times transformers in float32; 9.60 to 10.10, target 8\n")
    assert parse_ratio(line) == ("int8, 8 streams: times transformers in float32", 9.85)
    assert parse_ratio("round 1: 9.85 MB/s") is None


def test_a_card_names_only_the_settings_that_change_something():
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
                "max_new_tokens": 120}
    assert describe(settings) == "temperature 0.8, top-k 50, at most 120 tokens"
    settings |= {"top_k": None, "top_p": 0.9, "repetition_penalty": 1.05}
    assert describe(settings) == (
        "temperature 0.8, top-p 0.9, at most 120 tokens, repetition penalty 1.05")


def test_repeated_pairs_and_turns_with_a_word_of_the_user_are_counted():
    turns = ["Do you like dogs?", "Dogs are good, dogs are", "Me, too.", "I like what you like"]
    messages = [{"role": role, "content": turn}
                for role, turn in zip(["user", "assistant"] * 2, turns)]
    # of 8 pairs "dogs are" comes again; only the first reply has a word that is not common
    assert repetition.count([messages]) == (1 / 8, 1 / 2)


@pytest.mark.slow
def test_the_program_for_a_gpu_can_be_rehearsed_on_a_cpu(monkeypatch):
    monkeypatch.setitem(on_gpu.SIZES, "tiny", on_gpu.TINY)  # removes it afterwards
    config = on_gpu.Config(device="cpu", tiny=True)
    device = torch.device("cpu")
    for name in on_gpu.SECTIONS:
        result = on_gpu.run_section(dataclasses.replace(config, sections=(name,)), device)
        assert result, name
        if name == "compare_with_cpu":
            assert result["equal"]
        elif name == "skip_a_bad_gradient":
            assert result == {"adamw": True, "muon": True}
        elif name == "resume":
            assert result == {"bitwise_equal": True}
        elif name == "crowd":
            assert result == {"same_text": True}
        elif name == "micro_batch":
            assert "skipped" in result
        elif name == "step":
            assert result["ours"]["tokens_per_s"] > 0


def test_a_failed_section_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sections = {"crowd": (0.01, on_gpu.crowd), "micro_batch": (60, on_gpu.micro_batch)}
    monkeypatch.setattr(on_gpu, "SECTIONS", sections)
    on_gpu.main(on_gpu.Config(device="cpu", tiny=True))
    results = json.loads((tmp_path / "on_gpu.json").read_text())
    assert results["crowd"] == {"failed": "took more than 0.01 s"}
    assert results["micro_batch"]["skipped"]


def test_without_a_gpu_the_program_for_one_says_so():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no device 'cuda'"):
            on_gpu.main(on_gpu.Config())


def test_a_lower_ratio_and_a_failed_program_are_reported(tmp_path, monkeypatch, capsys):
    programs, readme = tmp_path / "benchmarks", tmp_path / "benchmarks" / "README.md"
    programs.mkdir()
    (programs / "__init__.py").touch()
    readme.write_text("before\n<!-- ratios -->\n<!-- end of ratios -->\nafter\n")
    monkeypatch.chdir(tmp_path)  # `python -m benchmarks.one` starts the programs of this folder
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "PROGRAMS", {"one": [], "two": [], "three": ["{corpus}"]})

    def run_with(one: str, two: str) -> int:
        (programs / "one.py").write_text(one)
        (programs / "two.py").write_text(two)
        return run.main(run.Config())

    assert run_with("print('= ours: 2.00 times theirs; 1 to 3')", "print('= two: 4.00 of it')") == 0
    assert "three: skipped, needs --corpus" in capsys.readouterr().out

    assert run_with("print('= ours: 1.70 times theirs')", "raise SystemExit(1)") == 1
    output = capsys.readouterr().out
    assert "one: ours: 1.70 times theirs (was 2.00)" in output
    assert "two failed" in output

    table = readme.read_text()
    assert "| ours: **1.70** times theirs | `one` |" in table
    assert "| two: **4.00** of it |" in table
    assert table.startswith("before\n")
    assert table.endswith("after\n")
