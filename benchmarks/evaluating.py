"""evaluate.py against lm-evaluation-harness's Hugging Face backend: figures and examples/s.

    pip install -r requirements-interop.txt
    python -m benchmarks.evaluating hellaswag_val.jsonl --examples 200 --rounds 3

The four local tasks have the shapes of the harness's: answers to a question (HellaSwag's), a last
word (LAMBADA's), letters after solved examples (MMLU's) and whole texts (WikiText's). The model is
the bundled `edu`, exported for transformers by publish.py. The programs run in alternating rounds.
"""
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import tyro
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import publish
from benchmarks.ratio import divide, print_ratio
from checkpoint import load_model
from engine.harness import HarnessModel
from generate import Engine
from hellaswag import read_examples
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.huggingface import save_huggingface

LETTERS = "Question: {{ctx[:60]}}\nA. {{endings[0][:30]}}\nB. {{endings[1][:30]}}\nAnswer:"
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
    """Any name of a model; random is GPT-2 124M with random weights."""
    device: str = "cpu"
    examples: int = 200
    batch_size: int = 16
    """The Hugging Face backend's batch size."""
    rounds: int = 3


def main(config: Config):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder / "tasks", read_examples(config.data, config.examples))
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        if config.model == "random":
            torch.manual_seed(0)
            save_huggingface(folder / "model", GPT(SIZES["gpt2"]), gpt2_tokenizer(), torch.float32)
        else:
            publish.export(config.model, folder / "model", dtype="float32")

        # load the same weights into both programs
        model, tokenizer, _ = load_model(folder / "model", config.device)
        ours = HarnessModel(Engine(model, tokenizer, "float32"))
        theirs = HFLM(str(folder / "model"), device=config.device, dtype="float32",
                      batch_size=config.batch_size)
        for task in TASKS:
            our_times, their_times = [], []
            for _ in range(config.rounds):
                our_results, seconds = evaluate(ours, task, manager)
                our_times.append(seconds)
                their_results, seconds = evaluate(theirs, task, manager)
                their_times.append(seconds)
            print_comparison(task, our_results, their_results)
            speed = config.examples / statistics.median(our_times)
            print_ratio(f"lm-eval's requests, task `{task}`", divide(their_times, our_times),
                        "times its Hugging Face backend", f"{speed:.0f} examples/s")


def write_tasks(folder: Path, examples: list[dict]):
    folder.mkdir()
    data = folder / "examples.json"
    data.write_text("\n".join(json.dumps(example) for example in examples))
    for task, fields in TASKS.items():
        content = {"task": task, "dataset_path": "json", "test_split": "test", **fields,
                   "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{task}.yaml").write_text(json.dumps(content))  # JSON is YAML


def evaluate(lm, task: str, manager: TaskManager) -> tuple[dict, float]:
    """(the task's results, the seconds that the model took to answer the requests)."""
    seconds = 0.0

    def timed(method):
        def answer(requests, **options):
            nonlocal seconds
            began = time.perf_counter()
            answers = method(requests, **options)
            seconds += time.perf_counter() - began
            return answers
        return answer

    with mock.patch.multiple(lm, loglikelihood=timed(lm.loglikelihood),
                             loglikelihood_rolling=timed(lm.loglikelihood_rolling)):
        results = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return results["results"][task], seconds


def print_comparison(task: str, ours: dict, theirs: dict):
    for metric, value in ours.items():
        if isinstance(value, float) and "stderr" not in metric:
            print(f"{task:>12} {metric:<22} {value:>12.6f} ours {theirs[metric]:>12.6f} theirs  "
                  f"difference {abs(value - theirs[metric]):.1e}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
