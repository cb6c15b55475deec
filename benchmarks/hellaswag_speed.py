"""HellaSwag against build-nanogpt's script: examples/s and verdicts, in alternating rounds.

    git clone https://github.com/karpathy/build-nanogpt
    python -m benchmarks.hellaswag_speed hellaswag_val.jsonl build-nanogpt/
    python -m benchmarks.hellaswag_speed hellaswag_val.jsonl build-nanogpt/ --device cuda \
        --dtype bfloat16 --examples 10042

The model is GPT-2 124M, with random weights unless --model names another. The examples are drawn at
random from the file. The script runs unchanged and in its own precision, except that its model and
its examples come from here.
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

from benchmarks.ratio import divide, print_ratio
from checkpoint import load_model
from generate import Engine
from hellaswag import evaluate, read_examples
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.huggingface import save_huggingface


@dataclasses.dataclass
class Config:
    """Examples, model and rounds."""
    data: tyro.conf.Positional[Path]
    """HellaSwag's validation examples."""
    build_nanogpt: tyro.conf.Positional[Path]
    """A checkout of karpathy/build-nanogpt."""
    model: str | None = None
    """A folder in Hugging Face's layout; GPT-2 124M with random weights by default."""
    device: str = "cpu"
    dtype: str = "float32"
    """Our precision; the script has its own."""
    examples: int = 60
    rounds: int = 3


def main(config: Config):
    examples = read_examples(config.data)
    examples = random.Random(0).sample(examples, min(config.examples, len(examples)))
    with tempfile.TemporaryDirectory() as folder:
        # load the same model into both programs
        if config.model is None:
            torch.manual_seed(0)
            save_huggingface(folder, GPT(SIZES["gpt2"]), gpt2_tokenizer(), torch.float32)
        path = config.model or folder
        model, tokenizer, _ = load_model(path, config.device)
        model = Engine(model, tokenizer, config.dtype).packed
        script = load_script(config.build_nanogpt / "hellaswag.py")

        # evaluate in alternating rounds
        our_times, script_times = [], []
        for _ in range(config.rounds):
            began = time.perf_counter()
            ours = evaluate(model, tokenizer, examples, "nanogpt")["nanogpt"]
            our_times.append(time.perf_counter() - began)
            script_correct, seconds = run_script(script, path, config.device, examples)
            script_times.append(seconds)

    for name, times in ("ours", our_times), ("script", script_times):
        rounds = ", ".join(f"{seconds:.1f} s" for seconds in times)
        print(f"{name:>8}: {len(examples) / statistics.median(times):8.2f} examples/s "
              f"(rounds: {rounds})")
    our_correct = [choice == example["label"]
                   for choice, example in zip(ours["predictions"], examples)]
    equal = sum(a == b for a, b in zip(our_correct, script_correct))
    print_ratio(f"HellaSwag in {config.dtype}", divide(script_times, our_times),
                "times build-nanogpt's script", f"{equal} of {len(examples)} verdicts equal")


def load_script(path: Path):
    tiktoken.get_encoding = lambda name: gpt2_tokenizer().fast  # avoids a download
    spec = importlib.util.spec_from_file_location("build_nanogpt_hellaswag", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run_script(script, model: str, device: str, examples: list[dict]) -> tuple[list[bool], float]:
    """(whether each example is correct by acc_norm, seconds from the first example to the end)."""
    began = None

    def iterate_examples(split):
        nonlocal began
        began = time.perf_counter()  # the model is loaded by now
        yield from examples

    script.iterate_examples = iterate_examples
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.evaluate(model, device)
    seconds = time.perf_counter() - began

    # the script prints how many are correct so far
    counts = [int(count) for count in re.findall(r"acc_norm: (\d+)/", printed.getvalue())]
    return [after > before for before, after in itertools.pairwise([0, *counts])], seconds


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
