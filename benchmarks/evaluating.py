"""evaluate.py against lm-evaluation-harness's Hugging Face backend: figures and examples/s.

    pip install -r requirements-interop.txt
    python -m benchmarks.evaluating hellaswag_val.jsonl --examples 200 --rounds 3

The four local tasks have the shapes of the harness's: answers to a question (HellaSwag's), a last
word (LAMBADA's), letters after solved examples (MMLU's) and whole texts (WikiText's). The model is
the bundled `edu`, exported for transformers by publish.py. The programs run in alternating rounds.
"""
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import tyro
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import publish
from benchmarks.ratio import print_ratio
from checkpoint import load_model
from evaluate import evaluate
from generate import Engine
from hellaswag import read_examples

LETTERS = "Question: {{ctx}}\nA. {{endings[0]}}\nB. {{endings[1]}}\nAnswer:"
TASKS = {
    "endings": {
        "output_type": "multiple_choice", "doc_to_text": "{{activity_label}}: {{ctx}}",
        "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}", "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{ctx.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + ctx.split(' ')[-1]}}", "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    "letters": {
        "output_type": "multiple_choice", "doc_to_text": LETTERS, "doc_to_choice": ["A", "B"],
        "doc_to_target": "{{label % 2}}", "num_fewshot": 2, "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"}, "metric_list": [{"metric": "acc"}]},
    "texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "num_fewshot": 0,
        "doc_to_target": "{{ctx}} {{endings|join(' ')}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
}


@dataclasses.dataclass
class Config:
    """Examples, model and rounds."""
    data: tyro.conf.Positional[Path]
    """HellaSwag's validation examples."""
    model: str = "bundled:edu"
    device: str = "cpu"
    examples: int = 200
    batch_size: int = 16
    """Of the Hugging Face backend."""
    rounds: int = 3


def main(config: Config):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder / "tasks", read_examples(config.data, config.examples))
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        publish.export(config.model, folder / "model", dtype="float32")

        # load the same weights into both programs
        theirs = HFLM(str(folder / "model"), device=config.device, dtype="float32",
                      batch_size=config.batch_size)
        model, tokenizer, _ = load_model(folder / "model", config.device)
        engine = Engine(model, tokenizer, "float32")

        for task in TASKS:
            our_times, their_times = [], []
            for _ in range(config.rounds):
                our_results, seconds = timed(lambda: evaluate(engine, [task], manager))  # noqa: B023
                our_times.append(seconds)
                their_results, seconds = timed(lambda: simple_evaluate(  # noqa: B023
                    theirs, tasks=[task], task_manager=manager, bootstrap_iters=0))  # noqa: B023
                their_times.append(seconds)
            print_comparison(task, our_results["results"][task], their_results["results"][task])
            speed = config.examples / statistics.median(our_times)
            ratios = [their / our for our, their in zip(our_times, their_times)]
            print_ratio(f"the task `{task}`", ratios, "times lm-eval's Hugging Face backend",
                        f"{speed:.0f} examples/s")


def write_tasks(folder: Path, examples: list[dict]):
    folder.mkdir()
    data = folder / "examples.json"
    data.write_text("\n".join(json.dumps(example) for example in examples))
    for task, fields in TASKS.items():
        content = {"task": task, "dataset_path": "json", "test_split": "test", **fields,
                   "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{task}.yaml").write_text(json.dumps(content))  # JSON is YAML


def timed(run) -> tuple[dict, float]:
    """(the results of `run`, its seconds of wall time)."""
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        results = run()
    return results, time.perf_counter() - began


def print_comparison(task: str, ours: dict, theirs: dict):
    for metric, value in ours.items():
        if isinstance(value, float) and "stderr" not in metric:
            print(f"{task:>12} {metric:<22} {value:>12.6f} ours {theirs[metric]:>12.6f} theirs  "
                  f"difference {abs(value - theirs[metric]):.1e}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
