"""examples/speedrun.sh, from a text to an exported model."""
import json
import os
import subprocess
import sys

import pytest
from conftest import PROSE, ROOT, metrics
from test_hellaswag import EXAMPLES

from checkpoint import load_model


def speedrun(**variables) -> str:
    environment = {
        "PRESET": "shakespeare-char-cpu", "NAME": "small", "PROCESSES": "2", "CORPUS": "prose.txt",
        "TOKENIZER": "char", "HELLASWAG": "examples.jsonl", "PRICE": "3600", "PAGE": "no",
        "PYTHON": sys.executable, "OPTIONS": "--max-steps 4 --device cpu --n-layer 1"}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "speedrun.sh"], env={**os.environ, **environment, **variables},
        capture_output=True, encoding="utf-8", check=False)
    return f"{done.stdout}{done.stderr}exit code {done.returncode}"


@pytest.mark.slow
def test_the_speedrun_resumes_and_ends_with_an_exported_model(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))

    # a step fails; the next start skips what was done before it
    failed = speedrun(OPTIONS="--max-steps 4 --device cpu --n-layer 0")
    assert "exit code 0" not in failed
    output = speedrun()
    assert "exit code 0" in output, output
    assert output.count("done before") == 2  # environment and data
    assert metrics(tmp_path / "log" / "small", "step", "val_loss")[-1][0] == 4

    # what remains of the run
    model, tokenizer, _ = load_model(tmp_path / "small-model")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert "validation loss" in (tmp_path / "small-model" / "README.md").read_text()
    assert "best validation loss" in (tmp_path / "small-report.txt").read_text()
    assert json.loads((tmp_path / "small-hellaswag.json").read_text())["nanogpt"]["n"]
    assert "on 2 devices cost" in output

    assert speedrun().count("done before") == 6
