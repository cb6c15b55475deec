"""What the benchmarks compute, where that is more than to time."""
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    def names_of(file: str) -> dict:
        monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return runpy.run_path(str(BENCHMARKS / file))
    return names_of


def test_a_law_is_found_again_in_losses_that_follow_it(program):
    scaling = program("scaling.py")
    law = scaling["Law"](2.5, 300.0, 900.0, 0.33, 0.41)
    N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(4e5, 4e6, 4), np.geomspace(2e5, 2e6, 4)))
    found = scaling["fit"](N, D, law.loss(N, D))
    assert found == pytest.approx(law, rel=1e-3)
    noisy = scaling["fit"](N, D, law.loss(N, D) + np.random.default_rng(0).normal(0, 0.01, len(N)))
    assert noisy.loss(3.5e6, 2e7) == pytest.approx(law.loss(3.5e6, 2e7), abs=0.15)


def test_the_tokens_to_a_loss_lie_between_the_points_of_a_curve(program):
    tokens_to = program("recipes.py")["tokens_to"]
    curve = pd.DataFrame({"tokens": [0, 100, 200], "val_loss": [8.0, 6.0, 5.0]})
    assert tokens_to(curve, 6.0) == 100 and tokens_to(curve, 5.5) == 150 and tokens_to(curve, 4.9) == math.inf


def test_a_ratio_that_fell_and_a_program_that_failed_are_named(program, tmp_path, capsys):
    run = program("run.py")
    main, readme, programs = run["main"], tmp_path / "README.md", tmp_path / "benchmarks"
    main.__globals__.update(ROOT=tmp_path, PROGRAMS={"one": [], "two": [], "three": ["{corpus}"]})
    programs.mkdir()
    readme.write_text("before\n<!-- ratios -->\n<!-- /ratios -->\nafter\n")

    def measure(one: str, two: str) -> int:
        for name, source in ("one", one), ("two", two):
            (programs / f"{name}.py").write_text(source)
        return main(run["Config"]())

    assert measure("print('= 2.00 ours against theirs; 1 to 3')", "print('= 4.00 of two')") == 0
    assert "three: skipped, as it needs --corpus" in capsys.readouterr().out
    assert measure("print('= 1.70 ours against theirs')", "raise SystemExit(1)") == 1
    said = capsys.readouterr().out
    assert "one: ours against theirs is 1.70, and was 2.00" in said and "two failed" in said
    table = readme.read_text()
    assert "| ours against theirs | 1.70 | `benchmarks/one.py` |" in table and "| of two | 4.00 |" in table
    assert table.startswith("before\n") and table.endswith("after\n")
