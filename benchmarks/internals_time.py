"""The time that the layers of Look inside take, for GPT-2 124M with random weights.

    python -m benchmarks.internals_time               # 200 tokens; --tokens N for another number

The time is that of a new text: all layers traced, the logit lens of the columns that the page
shows, and the contributions to one logit (target: 2 s on two cores). Medians over --rounds.
"""
import itertools
import statistics
import time

import torch
import tyro

from engine.internals import trace_tokens
from engine.packed import use_allowed_cores
from model import GPT, GPTConfig
from ui.layers import LENS_COLUMNS


def main(tokens: int = 200, rounds: int = 5):
    use_allowed_cores()
    model = GPT(GPTConfig()).eval()
    ids = torch.randint(50257, (tokens,)).tolist()

    measure(model, ids)  # the first run allocates memory
    times = [measure(model, ids) for _ in range(rounds)]
    trace_s, lens_s, contributions_s = map(statistics.median, zip(*times))
    print(f"{tokens} tokens of GPT-2 124M, {torch.get_num_threads()} threads: "
          f"{trace_s + lens_s + contributions_s:.2f} s")
    print(f"trace {trace_s:.2f} s, lens of {LENS_COLUMNS} tokens {lens_s:.2f} s, "
          f"contributions {contributions_s:.3f} s")


def measure(model: GPT, ids: list[int]) -> list[float]:
    """Seconds for the trace, the page's lens and the contributions."""
    wte = model.transformer.wte.weight
    times = [time.perf_counter()]
    trace = trace_tokens(model, ids)
    times.append(time.perf_counter())
    trace.lens(list(range(len(ids) - LENS_COLUMNS, len(ids)))).topk(1)
    times.append(time.perf_counter())
    trace.contributions(-1, wte[ids[-1]] - wte.mean(0))
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
