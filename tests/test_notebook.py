"""play.ipynb runs from top to bottom without the network, and is committed with its outputs."""
import json
import math
import shutil

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "play.ipynb"

# a cell that prints the notebook's variables at its end
PRINT_RESULTS = """
print(json.dumps({
    "vocab_size": chars.vocab_size, "entropy": entropy, "first_losses": first_losses,
    "one_batch": [losses[-1], accuracy],
    "validation": report.loss(run.folder).query("curve == 'validation'")["loss"].tolist(),
    "saved": [info["step"], info["val_loss"]],
    "attention_sums": (attention.sum(-1) - 1).abs().max().item(),
    "hidden_difference": (hidden - shakespeare.hidden(idx)).abs().max().item(),
    "previous_character":
        attention[heads["the previous character"]].diagonal(-1).mean().item(),
    "choices": [count_choices(temperature=t, top_k=k)
                for t, k in ((0.5, None), (1, None), (2, None), (2, 4))],
    "cache_difference": difference,
    "first_equals_single": batch[0] == single, "different_texts": len(set(batch)),
    "hellaswag": {name: [result["n"], len(result["predictions"])]
                  for name, result in results.items()},
    "no_openai": openai is None, "files": sorted(os.listdir("."))}))
"""


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code"
            for output in cell.outputs]


def count_pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed_text(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_runs_and_its_claims_hold(tmp_path, monkeypatch):
    # a folder, a home for caches, and one thread
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    for name in "TMPDIR", "HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR":
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    # run the notebook, with one more cell that prints its results
    notebook = nbformat.read(folder / "play.ipynb", as_version=4)
    committed_pictures = count_pictures(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(PRINT_RESULTS))
    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(folder)}}).execute()
    results = json.loads(printed_text(notebook.cells[-1]))
    uniform_loss = math.log(results["vocab_size"])

    # the first losses; two published runs of GPT-2 124M began at 10.92 and 10.94
    assert results["first_losses"]["small"] == pytest.approx(uniform_loss, abs=0.1)
    assert results["first_losses"]["GPT-2 124M"] == pytest.approx(10.93, abs=0.1)

    # one batch is memorized
    loss, accuracy = results["one_batch"]
    assert loss < 0.2 and accuracy > 0.9

    # the run learns, but not beyond the entropy of its text, and is saved
    first, *_, last = results["validation"]
    assert first == pytest.approx(uniform_loss, abs=0.1)
    assert results["entropy"] < last < 2.3 < first
    assert results["saved"] == [400, pytest.approx(last)]

    # attention
    assert results["attention_sums"] < 1e-5 and results["hidden_difference"] < 1e-4
    assert results["previous_character"] > 0.5

    # sampling
    at_05, at_1, at_2, with_top_k = results["choices"]
    assert 1 < at_05 < at_1 < at_2 < results["vocab_size"] and with_top_k <= 4

    # the KV cache and batches
    assert 0 < results["cache_difference"] < 1e-3
    assert results["first_equals_single"] and results["different_texts"] == 32

    # HellaSwag
    assert results["hellaswag"] == {"nanogpt": [3, 3], "harness": [3, 3]}

    # without the network, GPT-2 is one sentence
    assert results["no_openai"]
    texts = [output.get("text", "") for output in outputs(notebook)]
    assert any("the Hub cannot be reached" in text for text in texts)

    # all pictures are drawn, nothing is printed to stderr, files are where the notebook says
    assert count_pictures(notebook) == committed_pictures
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))
    assert results["files"] == ["data", "hellaswag.jsonl", "log", "play.txt"]
    assert [path.name for path in folder.iterdir()] == ["play.ipynb"]


def test_the_committed_notebook_has_all_outputs_and_is_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
    assert count_pictures(notebook) >= 15 and NOTEBOOK.stat().st_size < 600_000
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text and "/home/" not in text
