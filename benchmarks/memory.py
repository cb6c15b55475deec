"""Peak memory and communication of a training step, as --dry-run predicts and as counted.

    python -m benchmarks.memory             # 15 minutes; writes the table of docs/scaling.md
    python -m benchmarks.memory gpt3-13b    # prints the rows of this model

Counted means that the real step runs on simulated H100s (tests/fake_gpu.py), with every layer, for
one rank of 1, 8 or 64. A row that does not fit an H100 is counted, too.
"""
import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import ddp
import train
from benchmarks.pages import write_lines
from benchmarks.train_throughput import build_run, configure
from tests.fake_gpu import Machine, Report, SimulatedGPU
from training import plan
from training.config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"

# size of the model, number of devices, --shard, micro-batch in sequences
ROWS = [
    ("gpt2", 1, False, 64), ("gpt2", 8, False, 64), ("gpt2", 64, False, 8),
    ("gpt2-xl", 1, False, 8), ("gpt2-xl", 8, False, 8), ("gpt2-xl", 64, True, 8),
    ("gpt3-2.7b", 8, True, 4), ("gpt3-6.7b", 8, True, 4), ("gpt3-6.7b", 64, True, 4),
    ("gpt3-13b", 8, True, 1), ("gpt3-13b", 64, True, 2),
]


class Comparison(NamedTuple):
    planned_memory: float  # bytes
    counted_memory: float
    planned_bytes: float  # sent by a process in a step
    counted_bytes: float


def take_steps(gpu: SimulatedGPU, world: ddp.World, config: TrainConfig) -> dict[str, float]:
    """Takes two steps, as the first has no optimizer state yet, and returns the second's plan.

    The report has the second step's peak and collectives. Raises HostSync if a step waits for the
    GPU.
    """
    run = build_run(config, world)
    share = config.batch_tokens // config.block_size // world.size
    x = torch.zeros(share, config.block_size, dtype=torch.int64, device=world.device)
    for step in range(2):
        gpu.reset_peak()
        gpu.collectives.clear()
        with gpu.without_syncs():
            train.train_step(run, x, x, step)
    planned = plan.bytes_held(config, run.model, config.micro_batch, world.size, True, "cuda")
    return {"memory": sum(planned.values()),
            "communication": plan.bytes_sent(config, run.model, world.size)}


def compare(report: Report, size: int) -> Comparison:
    """Sets the plan of `take_steps` on one of `size` ranks beside what was counted."""
    # in a ring, an all-reduce passes the tensor round twice, a gather or scatter once
    sent = 0.0
    for collective in report.collectives:
        rounds = 2 if "reduce" in collective.name and "scatter" not in collective.name else 1
        sent += rounds * collective.bytes * (size - 1) / size
    return Comparison(report.result["memory"], report.peak_bytes,
                      report.result["communication"], sent)


def main(models: list[str]):
    lines = ["| model | devices | `--shard` | micro-batch | memory, planned | counted "
             "| sent in a step, planned | counted |", "| --- " * 8 + "|"]
    with Machine() as machine:
        for size, devices, shard, micro_batch in ROWS:
            if models and size not in models:
                continue
            config = configure(size, shard=shard, micro_batch=micro_batch)
            # one or two micro-batches tell as much as all of them
            share = min(config.batch_tokens // config.block_size // devices, 2 * micro_batch)
            config = dataclasses.replace(config, batch_tokens=share * devices * config.block_size)
            report, = machine.run(take_steps, config, size=devices)
            figures = [f"{number / 1e9:.1f} GB" for number in compare(report, devices)]
            lines.append(f"| `{size}` | {devices} | {'yes' if shard else 'no'} | {micro_batch} | "
                         f"{' | '.join(figures)} |")
            print(lines[-1], flush=True)
    if not models:
        write_lines(PAGE, "memory", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
