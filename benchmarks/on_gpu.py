"""Everything that only a GPU can tell, in one command of at most nine minutes.

    python -m benchmarks.on_gpu                                   # on a machine with a GPU
    python -m benchmarks.on_gpu --checkouts build-nanogpt/ nanoGPT/
    python -m benchmarks.on_gpu --device cpu --tiny               # a rehearsal without a GPU

Each section runs in a process of its own with a time limit, so that one that fails does not stop
the others. It needs no data and no network. The results are printed and written to on_gpu.json.
"""
import contextlib
import copy
import dataclasses
import functools
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.program import report_user_errors

import numpy as np
import torch
import tyro

import checkpoint
import ddp
import train
from benchmarks import decode, train_throughput
from benchmarks.train_throughput import VOCAB_SIZE
from common.devices import find_device
from common.errors import UserError
from common.files import write_json
from generate import Engine
from hellaswag import evaluate
from model import GPT, SIZES, GPTConfig
from tokenizer import gpt2_tokenizer
from training import setup
from training.loss import ChunkedCrossEntropy

TINY = GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)


@dataclasses.dataclass
class Config:
    """What to measure, and where."""
    checkouts: tuple[Path, ...] = ()
    """Folders of build-nanogpt or nanoGPT, to compare training steps with."""
    device: str = "cuda"
    tiny: bool = False
    """A tiny model and few repetitions: shows that the program runs, and measures nothing."""
    sections: tuple[str, ...] = ()
    """Run these sections only."""
    out: Path = Path("on_gpu.json")
    inside: bool = False
    """Run the one section in this process and print its result (used by the program itself)."""

    @property
    def size(self) -> str:
        return "tiny" if self.tiny else "gpt2"


def main(config: Config):
    device = ddp.pick_device(config.device)
    if unknown := set(config.sections) - set(SECTIONS):
        raise UserError(f"Unknown section {', '.join(unknown)}: choose from "
                        f"{', '.join(SECTIONS)}.")
    if config.inside:
        print(json.dumps(run_section(config, device)))
        return
    results = {"device": ddp.device_name(device), "torch": torch.__version__, "tiny": config.tiny}
    for name in config.sections or SECTIONS:
        results[name] = start_section(name, config)
        print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
        write_json(config.out, results)  # after each section, in case the machine is taken away


def start_section(name: str, config: Config) -> dict:
    """Runs a section in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--inside", "--sections", name,
               "--device", config.device, *(["--tiny"] if config.tiny else [])]
    if config.checkouts:
        command += ["--checkouts", *map(str, config.checkouts)]
    limit_s, _ = SECTIONS[name]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=limit_s,
                              check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit_s} s"}
    seconds = round(time.perf_counter() - began, 1)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-5:], "seconds": seconds}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "seconds": seconds}


def run_section(config: Config, device: torch.device) -> dict:
    SIZES["tiny"] = TINY
    _, section = SECTIONS[config.sections[0]]
    with contextlib.redirect_stdout(sys.stderr):
        return section(config, device)


# --------------------------------------------------------------------------------------------------
# Is it right?

def compare_with_cpu(config: Config, device: torch.device) -> dict:
    """The loss and the gradient of a small model in float32 and bfloat16, against the CPU's."""
    torch.manual_seed(0)
    sizes = dataclasses.replace(TINY, vocab_size=VOCAB_SIZE)
    model = GPT(sizes)
    on_device = copy.deepcopy(model).to(device)
    sequences = 20 if config.tiny else 300  # enough for a loss in chunks
    x = torch.randint(50_257, (sequences, sizes.block_size))
    expected = model(x, x)[1]
    expected.backward()
    differences = {}
    for name in ("float32", "bfloat16"):
        on_device.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            loss = on_device(x.to(device), x.to(device))[1]
        loss.backward()
        errors = [(p.grad.cpu() - q.grad).norm() / q.grad.norm()
                  for p, q in zip(on_device.parameters(), model.parameters()) if q.grad.norm() > 0]
        differences[name] = {"loss": abs(loss.item() - expected.item()),
                             "gradient": max(errors).item()}
    right = differences["float32"]["loss"] < 1e-4 and differences["float32"]["gradient"] < 1e-3
    return {"equal": right and differences["bfloat16"]["loss"] < 0.02, **differences}


def skip_a_bad_gradient(config: Config, device: torch.device) -> dict:
    """Whether AdamW and Muon leave the weights as they are if a gradient is not finite."""
    unchanged = {}
    for optimizer in ("adamw", "muon"):
        run, x = build_step(config, device, optimizer=optimizer)
        train.train_step(run, x, x, 0)
        bad = run.model.transformer.ln_f.weight
        before = [p.detach().clone() for p in run.model.parameters()]
        handle = bad.register_hook(lambda gradient: gradient * float("nan"))
        train.train_step(run, x, x, 1)
        handle.remove()
        unchanged[optimizer] = all(
            torch.equal(p, q) for p, q in zip(run.model.parameters(), before))
    return unchanged


def resume(config: Config, device: torch.device) -> dict:
    """Whether a run that was interrupted ends with the bits of one that was not."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_tokens(Path("tokens"))
        train_config = train_throughput.configure(
            config.size, data=Path("tokens"), name="run", deterministic=True, hellaswag="none",
            batch_tokens=8 * SIZES[config.size].block_size, micro_batch=4, max_steps=6,
            warmup_steps=1, save_every=3, eval_tokens=512, sample_every=1000, samples=1)
        world = ddp.World(0, 1, device)
        train.train(train_config, world)
        run = checkpoint.LOG / "run"
        whole = torch.load(run / "model_00006.pt", weights_only=True)["model"]
        for path in run.glob("*_00006*"):  # as if it had been killed before the last checkpoint
            path.rename(path.with_name(f"old-{path.name}"))
        train.train(train_config, world)
        resumed = torch.load(run / "model_00006.pt", weights_only=True)["model"]
        return {"bitwise_equal": all(torch.equal(whole[name], resumed[name]) for name in whole)}


def crowd(config: Config, device: torch.device) -> dict:
    """Whether a text is the same when it is generated beside 31 others."""
    engine = build_engine(config, device)
    alone = engine.generate([1, 2, 3], max_new_tokens=24, seed=7)
    request = engine.submit([1, 2, 3], max_new_tokens=24, seed=7)
    others = [engine.submit([i, 5], max_new_tokens=24, seed=i) for i in range(31)]
    ids = [token.id for _, token in request if not isinstance(token, str)]
    for other in others:
        list(other)
    return {"same_text": engine.tokenizer.decode(ids) == alone[0]}


# --------------------------------------------------------------------------------------------------
# How fast is it?

def step(config: Config, device: torch.device) -> dict:
    """Tokens/s, MFU and peak memory of a compiled training step, ours and others'."""
    sequences, steps = (2, 1) if config.tiny else (64, 10)
    throughput = train_throughput.Config(
        size=config.size, sequences=sequences, device=config.device,
        dtype="bfloat16" if ddp.auto_dtype(device) == torch.bfloat16 else "float32")
    x, y = train_throughput.random_batch(throughput, device)
    flops = train_throughput.flops_per_token(config.size)
    sheet = find_device(ddp.device_name(device))

    results = {}
    compiled = not config.tiny
    for name in ("ours", *map(str, config.checkouts), "transformers"):
        try:
            take_step = train_throughput.build_step(
                train_throughput.Way(name, compiled), throughput, device)
            reset_memory(device)
            for number in range(3):  # compiles and warms up
                take_step(x, y, number)
            seconds = timed(functools.partial(take_step, x, y, 3), steps)
        except Exception as error:  # another program's, or a missing package
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        speed = x.numel() / seconds
        results[name] = {"tokens_per_s": round(speed), "peak_gb": peak_gb(device)}
        if sheet:
            results[name]["mfu"] = round(speed * flops / sheet.flops, 4)
        take_step = None  # frees its memory
    return results


def loss_chunks(config: Config, device: torch.device) -> dict:
    """Milliseconds and peak memory of the loss of a micro-batch, by rows of logits at a time."""
    n, width = (256, 16) if config.tiny else (64 * 1024, 768)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(n, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, width, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (n,), device=device)
    results = {}
    for rows in (64, 128) if config.tiny else (2048, 4096, 8192, 16_384):
        def both_passes(rows=rows):
            ChunkedCrossEntropy.apply(x, weight, targets, rows, True).backward()

        both_passes()
        reset_memory(device)
        results[f"{rows} rows"] = {"ms": round(1000 * timed(both_passes, 3), 1),
                                   "peak_gb": peak_gb(device)}
    return results


def micro_batch(config: Config, device: torch.device) -> dict:
    """What --micro-batch auto finds for GPT-2 124M."""
    if device.type != "cuda":
        return {"skipped": "a CPU's memory is estimated, not tried"}
    run, _ = build_step(config, device, micro_batch="auto", batch_tokens=2**19)
    sequences = setup.choose_micro_batch(run.config, None, run.model, run.world)
    return {"sequences": sequences, "peak_gb": peak_gb(device)}


def sampling(config: Config, device: torch.device) -> dict:
    """Tokens/s of several streams; for one, the share of what the memory bandwidth allows."""
    engine = build_engine(config, device)
    prompt = list(range(10, 26 if config.tiny else 74))
    new_tokens = 6 if config.tiny else 64
    results = {}
    for streams in (1, 2) if config.tiny else (1, 8, 64, 256):
        decode.decode(engine, prompt, streams, 4)  # warms up
        results[f"{streams} streams"] = round(decode.decode(engine, prompt, streams, new_tokens))
    if sheet := find_device(ddp.device_name(device)):
        limit = sheet.bandwidth / (2 * engine.model.num_parameters())
        results["share_of_bandwidth"] = round(results["1 streams"] / limit, 3)
    return results


def hellaswag_speed(config: Config, device: torch.device) -> dict:
    """Examples/s on random texts as long as HellaSwag's."""
    engine = build_engine(config, device)
    words = engine.tokenizer.decode(list(range(1000, 2000))).split()
    draw = random.Random(0)

    def text(n_words: int) -> str:
        return " ".join(draw.choices(words, k=n_words))

    examples = [{"ctx": text(40), "activity_label": "", "label": 0,
                 "endings": [text(18) for _ in range(4)]}
                for _ in range(4 if config.tiny else 2000)]
    evaluate(engine.packed, engine.tokenizer, examples[:4], "nanogpt")  # warms up
    seconds = timed(lambda: evaluate(engine.packed, engine.tokenizer, examples, "nanogpt"), 1)
    return {"examples_per_s": round(len(examples) / seconds, 1)}


# --------------------------------------------------------------------------------------------------
# Helpers of the sections

def build_step(config: Config, device: torch.device, **options):
    """A run without data that train_step can use, and a micro-batch for it."""
    block_size = SIZES[config.size].block_size
    options = {"batch_tokens": 4 * block_size, "micro_batch": 2, **options}
    run = train_throughput.build_run(train_throughput.configure(config.size, **options),
                                     ddp.World(0, 1, device))
    return run, torch.randint(50_257, (4, block_size), device=device)


def build_engine(config: Config, device: torch.device) -> Engine:
    torch.manual_seed(0)
    model = GPT(SIZES[config.size]).to(device).eval()
    return Engine(model, gpt2_tokenizer(), max_running=256, max_waiting=256)


def write_tokens(folder: Path):
    """Random tokens in build-nanogpt's layout."""
    folder.mkdir()
    for number, split in enumerate(("val", "train")):
        tokens = np.random.default_rng(number).integers(0, 50_257, 200_000, dtype=np.uint16)
        np.save(folder / f"edu_{split}_{number:06d}.npy", tokens)


def timed(function: Callable, times: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def reset_memory(device: torch.device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None


# the sections and their limits in seconds, 540 in all
SECTIONS = {
    "compare_with_cpu": (30, compare_with_cpu),
    "skip_a_bad_gradient": (30, skip_a_bad_gradient),
    "step": (180, step),
    "loss_chunks": (40, loss_chunks),
    "micro_batch": (50, micro_batch),
    "sampling": (90, sampling),
    "crowd": (30, crowd),
    "hellaswag_speed": (40, hellaswag_speed),
    "resume": (50, resume),
}


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic
    with report_user_errors():
        main(tyro.cli(Config, description=__doc__))
