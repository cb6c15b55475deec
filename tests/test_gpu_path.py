"""What only a GPU would run, on simulated H100s: see fake_gpu.py."""
import json
import os
import types

import numpy as np
import pytest
import torch
from test_hellaswag import EXAMPLES

import checkpoint
import train
from benchmarks.memory import compare, configure, take_steps
from benchmarks.train_throughput import build_run
from engine.forward import Segment
from generate import Engine
from model import GPT, GPTConfig
from tests.fake_gpu import HostSync, Machine
from tokenizer import load_tokenizer
from training import setup, sharding, signals
from training.meter import Meter


@pytest.fixture(scope="module")
def machine():
    try:
        with Machine() as machine:
            yield machine
    except OSError as error:
        pytest.skip(str(error))


# --------------------------------------------------------------------------------------------------
# A training step

@pytest.mark.parametrize(("size", "processes", "options"), [
    ("gpt2", 1, {"micro_batch": 16, "batch_tokens": 2**15}),
    ("gpt2", 8, {"micro_batch": 64, "n_layer": 3}),
    ("gpt2", 8, {"micro_batch": 2, "batch_tokens": 2**15, "n_layer": 3}),
    ("gpt2", 64, {"micro_batch": 4, "n_layer": 3, "optimizer": "muon"}),
    ("gpt2-xl", 1, {"micro_batch": 4, "batch_tokens": 2**13, "n_layer": 3, "recompute": "on"}),
    ("gpt3-13b", 8, {"micro_batch": 2, "batch_tokens": 2**16, "n_layer": 3, "shard": True}),
    ("gpt3-2.7b", 64, {"micro_batch": 4, "n_layer": 2, "shard": True})])
def test_a_step_never_waits_and_takes_the_memory_and_traffic_of_the_plan(
        machine, size, processes, options):
    ranks = (0, processes - 1) if processes == 8 else (0,)
    reports = machine.run(take_steps, configure(size, **options), size=processes, ranks=ranks)
    assert reports[0].collectives == reports[-1].collectives
    figures = compare(reports[0], processes)
    assert figures.planned_memory == pytest.approx(figures.counted_memory, rel=0.1)
    assert figures.planned_bytes == pytest.approx(figures.counted_bytes, rel=0.1)


def log_steps(gpu, world, config):
    """Two logged steps: the CPU may wait in the second call of Meter.stop only."""
    run = build_run(config, world)
    meter = Meter(run)
    x = torch.zeros(2, config.block_size, dtype=torch.int64, device=world.device)
    gpu.syncs.clear()
    for step in range(2):
        meter.start()
        loss, norm, lr = train.train_step(run, x, x, step)
        meter.stop(step, loss, norm, lr, progress=None, pause_follows=False)


def test_the_meter_waits_for_the_gpu_at_the_steps_that_it_logs_only(machine):
    config = configure("gpt2", n_layer=1, batch_tokens=2048, micro_batch=2, log_every=2)
    report, = machine.run(log_steps, config)
    assert len(report.syncs) == 2  # the loss, and whether the run has diverged
    assert all(place.startswith("meter.py") for place in report.syncs)


# --------------------------------------------------------------------------------------------------
# A whole run

def train_and_count(gpu, world, config):
    os.chdir(config.data.parent)
    checkpoint.save = lambda *_: None  # there are no values to save
    sharding.SAMPLE_TOKENS = 2
    signals.time = types.SimpleNamespace(perf_counter=lambda: 0.0)  # the ranks have one clock
    train.train(config, world)
    return gpu.live_bytes


@pytest.mark.parametrize(("processes", "options"), [
    (1, {"optimizer": "muon", "micro_batch": "auto"}), (8, {}), (8, {"shard": True})])
def test_all_ranks_of_a_run_call_the_same_collectives(machine, tmp_path, processes, options):
    # write token shards in build-nanogpt's format, and HellaSwag
    (tmp_path / "data").mkdir()
    for number, split in enumerate(("val", "train")):
        tokens = np.random.default_rng(number).integers(0, 50_257, 70_000, dtype=np.uint16)
        np.save(tmp_path / "data" / f"edu_{split}_{number:06d}.npy", tokens)
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))

    config = configure("gpt2", **{
        "name": "gpu", "data": tmp_path / "data", "hellaswag": str(tmp_path / "hellaswag.jsonl"),
        "n_layer": 1, "block_size": 256, "micro_batch": 4, "batch_tokens": 2**14, "max_steps": 3,
        "eval_every": 2, "eval_tokens": 20_000, "sample_every": 3, "samples": 1, "log_every": 2,
        **options})
    ranks = (0, 7) if processes == 8 else (0,)
    reports = machine.run(train_and_count, config, size=processes, ranks=ranks)
    for report in reports:
        assert report.collectives == reports[0].collectives
    metrics = [json.loads(line) for line in (tmp_path / "log/gpu/metrics.jsonl").open()]
    assert [line["step"] for line in metrics if "val_loss" in line] == [0, 2, 3]
    assert [line["step"] for line in metrics if "hellaswag" in line] == [0, 2, 3]
    assert (tmp_path / "log/gpu/samples.jsonl").read_text().count("text") == 2


def choose_micro_batch(gpu, world, config, memory_bytes):
    run = build_run(config, world)
    gpu.memory_bytes = memory_bytes
    return setup.choose_micro_batch(config, None, run.model, world)


def test_micro_batch_auto_is_the_largest_that_fits(machine):
    config = configure("gpt2", micro_batch="auto")
    report, = machine.run(choose_micro_batch, config, 80e9)
    assert report.result == 128  # of 512, 256, 128, …; 64 take 29 GB


# --------------------------------------------------------------------------------------------------
# The engine

def sample_and_score(gpu, world):
    torch.manual_seed(0)
    with world.device:
        model = GPT(GPTConfig(n_layer=2, block_size=256, vocab_size=50_304)).eval()
    engine = Engine(model, load_tokenizer("gpt2"))
    texts = engine.generate([1, 2, 3] * 50, n=3, max_new_tokens=5)
    forward = engine.forward
    caches = [forward.new_cache() for _ in range(3)]
    forward([Segment(cache, 0, list(range(64))) for cache in caches], [63, 127, 191])
    gpu.syncs.clear()
    logits = forward([Segment(cache, 64, [5], True) for cache in caches], [0, 1, 2])
    return (engine.dtype, caches[0].kv.dtype, caches[0].kv.device.type, tuple(logits.shape),
            logits.device.type, len(texts), len(engine.inspect("Hello world", top=3)))


def test_the_engine_runs_in_bfloat16_on_a_gpu(machine):
    report, = machine.run(sample_and_score)
    assert report.result == ("bfloat16", torch.bfloat16, "cuda", (3, 50_304), "cpu", 3, 2)


# --------------------------------------------------------------------------------------------------
# The simulation notices mistakes

def mix_devices(gpu, world):
    torch.zeros(3, device=world.device) + torch.zeros(3)


def read_the_loss(gpu, world):
    with gpu.without_syncs():
        loss = torch.zeros(3, device=world.device).sum()
        if loss > 0:
            loss += 1


def copy_to_the_gpu(gpu, world):
    with gpu.without_syncs():
        torch.arange(3).to(world.device)


def find_nonzeros(gpu, world):
    with gpu.without_syncs():
        torch.zeros(3, device=world.device).nonzero()


@pytest.mark.parametrize(("scenario", "error"), [
    (mix_devices, RuntimeError), (read_the_loss, HostSync), (copy_to_the_gpu, HostSync),
    (find_nonzeros, HostSync)])
def test_mixing_devices_and_waiting_for_the_gpu_are_noticed(machine, scenario, error):
    with pytest.raises(error):
        machine.run(scenario)


def sum_on_rank_0_only(gpu, world):
    if world.is_main:
        torch.distributed.all_reduce(torch.zeros(3, device=world.device))


def test_a_collective_on_one_rank_only_is_noticed(machine):
    first, last = machine.run(sum_on_rank_0_only, size=8, ranks=(0, 7))
    assert first.collectives != last.collectives
