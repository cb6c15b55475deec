"""HellaSwag against build-nanogpt's script: examples a second and verdicts, both in one run, turn and turn about.

    python -m benchmarks.hellaswag_speed hellaswag_val.jsonl build-nanogpt/      # a checkout of karpathy/build-nanogpt
    python -m benchmarks.hellaswag_speed hellaswag_val.jsonl build-nanogpt/ --dtype bfloat16 --device cuda --examples 10042

The model is GPT-2 124M, with random weights unless --model names others; the examples are drawn at random from the file. The
script runs as it is, in its own precision, but for where its model and its examples come from.
"""


import contextlib
import dataclasses
import importlib.util
import io
import itertools
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import tiktoken
import torch
import tyro

from checkpoint import load_model
from generate import Engine
from hellaswag import evaluate, read_examples
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.huggingface import save_huggingface


@dataclasses.dataclass
class Config:
    """Measures."""
    data: tyro.conf.Positional[Path]
    build_nanogpt: tyro.conf.Positional[Path]
    model: str | None = None
    """A folder in Hugging Face's layout; random weights of GPT-2 124M when not given."""
    device: str = "cpu"
    dtype: str = "float32"
    """Ours; the script has its own."""
    examples: int = 60
    rounds: int = 3


def main(config: Config):
    examples = read_examples(config.data)
    examples = random.Random(0).sample(examples, min(config.examples, len(examples)))
    with tempfile.TemporaryDirectory() as folder:
        if config.model is None:
            torch.manual_seed(0)
            save_huggingface(folder, GPT(SIZES["gpt2"]), gpt2_tokenizer(), torch.float32)
        path = config.model or folder
        model, tokenizer, _ = load_model(path, config.device)
        model = Engine(model, tokenizer, config.dtype).packed
        script = load_script(config.build_nanogpt / "hellaswag.py")
        times = {"ours": [], "script": []}
        for _ in range(config.rounds):
            began = time.perf_counter()
            ours = evaluate(model, tokenizer, examples, "nanogpt")["nanogpt"]["predictions"]
            times["ours"].append(time.perf_counter() - began)
            verdicts, seconds = run_script(script, path, config.device, examples)
            times["script"].append(seconds)
    equal = sum((choice == e["label"]) == right for choice, e, right in zip(ours, examples, verdicts))
    for name, seconds in times.items():
        print(f"{name:>8}: {len(examples) / statistics.median(seconds):8.2f} examples/s "
              f"(rounds: {', '.join(f'{s:.1f} s' for s in seconds)})")
    ratios = [theirs / own for own, theirs in zip(*times.values())]
    print(f"= {statistics.median(ratios):.2f} HellaSwag in {config.dtype} against build-nanogpt's script; "
          f"{min(ratios):.2f} to {max(ratios):.2f}; equal verdicts: {equal} of {len(examples)}")


def load_script(path: Path):
    tiktoken.get_encoding = lambda name: gpt2_tokenizer().fast  # as it is, without a download
    spec = importlib.util.spec_from_file_location("build_nanogpt_hellaswag", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run_script(script, model: str, device: str, examples: list[dict]) -> tuple[list[bool], float]:
    """(which examples it got right by acc_norm, the seconds from its first to its last)."""
    times = []

    def iterate(split):
        for example in examples:
            times.append(time.perf_counter())
            yield example

    script.iterate_examples = iterate
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.evaluate(model, device)
    seconds = time.perf_counter() - times[0]
    counts = [0, *(int(count) for count in re.findall(r"acc_norm: (\d+)/", printed.getvalue()))]
    return [after > before for before, after in itertools.pairwise(counts)], seconds


if __name__ == "__main__":
    main(tyro.cli(Config))
