"""Tokens/s, MFU and peak memory of train.py's step, against other programs in the same session.

    git clone https://github.com/karpathy/build-nanogpt
    python -m benchmarks.train_throughput build-nanogpt/ --sequences 2 --dtype float32   # 15 min
    python -m benchmarks.train_throughput build-nanogpt/ nanoGPT/ --sequences 64 \
        --dtype bfloat16 --device cuda

A step is forward, backward, clipping and AdamW over one micro-batch of random tokens. Ours is
`train.train_step` itself. From a checkout it uses only the model's classes (build-nanogpt's
train_gpt2.py, nanoGPT's model.py), with fused AdamW; the same for transformers' GPT2LMHeadModel.
Each program runs in its own process, which has its own peak memory. The programs take turns, so
that a drift of the machine affects all of them. Prints medians, and ratios within rounds.
"""
import ast
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

import ddp
import train
from benchmarks.ratio import divide, print_ratio
from common.devices import find_device
from model import GPT, SIZES
from training.config import TrainConfig
from training.optim import build_optimizers
from training.presets import PRESETS
from training.setup import TrainingRun, create_scaler, model_sizes, place_model

VOCAB_SIZE = 50_304  # padded, as build-nanogpt's
TOKENIZER_SIZE = 50_257
BETAS = (0.9, 0.95)


@dataclasses.dataclass
class Config:
    """The step, and what it is compared with."""
    checkouts: tyro.conf.Positional[list[Path]] = dataclasses.field(default_factory=list)
    """Folders of build-nanogpt or nanoGPT."""
    size: str = "gpt2"
    sequences: int = 2
    """Sequences in the micro-batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    rounds: int = 3
    eager: bool = True
    """Also time each program without torch.compile."""


class Way(NamedTuple):
    """A program to time."""
    name: str  # "ours", "transformers" or a checkout
    compiled: bool

    def __str__(self):
        return f"{Path(self.name).name} {'compiled' if self.compiled else 'eager'}"


OURS = Way("ours", compiled=True)
Step = Callable[[torch.Tensor, torch.Tensor, int], float]  # x and y (B, T), step number -> loss


def main(config: Config):
    names = ["ours", *map(str, config.checkouts), "transformers"]
    ways = [Way(name, compiled) for name in names
            for compiled in ((True, False) if config.eager else (True,))]

    # start a process for each way
    context, pipes = multiprocessing.get_context("spawn"), {}
    for way in ways:
        pipes[way], other_end = context.Pipe()
        context.Process(target=serve_steps, args=(way, config, other_end), daemon=True).start()

    # let them take their steps in turn
    times, peaks, losses = {way: [] for way in ways}, {}, {}
    for number in range(config.rounds + 1):
        for way in ways:
            pipes[way].send(number)
            seconds, peaks[way], losses[way] = pipes[way].recv()
            if number > 0:  # the first round compiles and warms up
                times[way].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)  # ends its process
    print_results(config, times, peaks, losses)


def print_results(config: Config, times: dict[Way, list[float]], peaks: dict[Way, int],
                  losses: dict[Way, float]):
    block_size = SIZES[config.size].block_size
    tokens = config.sequences * block_size
    flops = flops_per_token(config.size)
    device_name = ddp.device_name(ddp.pick_device(config.device))
    device = find_device(device_name)
    print(f"torch {torch.__version__}, {device_name}, {config.dtype}, {config.size}, "
          f"{config.sequences} x {block_size} tokens per step, "
          f"{flops / 1e9:.3f} GFLOP per token")
    for way, seconds in times.items():
        speed = tokens / statistics.median(seconds)
        mfu = f", MFU {speed * flops / device.flops:.1%}" if device else ""
        print(f"{way!s:>30} {speed:10,.1f} tokens/s, {speed * flops / 1e9:8,.0f} GFLOP/s{mfu}, "
              f"peak {peaks[way] / 1e9:6.2f} GB, loss {losses[way]:.3f}")
        if way != OURS:
            print_ratio("training step, compiled", divide(seconds, times[OURS]), f"times {way}")


def flops_per_token(size: str) -> int:
    with torch.device("meta"):
        model = GPT(dataclasses.replace(SIZES[size], vocab_size=VOCAB_SIZE))
    return model.flops_per_token(SIZES[size].block_size)


# --------------------------------------------------------------------------------------------------
# The process of one way

def serve_steps(way: Way, config: Config, pipe):
    """Takes a step for each number received, and sends (seconds, peak bytes, loss) back.

    None ends the process.
    """
    device = ddp.pick_device(config.device)
    torch.manual_seed(0)
    take_step = build_step(way, config, device)
    x, y = random_batch(config, device)
    for step in iter(pipe.recv, None):
        began = time.perf_counter()
        loss = take_step(x, y, step)
        pipe.send((time.perf_counter() - began, peak_bytes(device), loss))


def random_batch(config: Config, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x and targets y, (B, T) each: contiguous, because some models take views of them."""
    block_size = SIZES[config.size].block_size
    tokens = torch.randint(TOKENIZER_SIZE, (config.sequences, block_size + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def build_step(way: Way, config: Config, device: torch.device) -> Step:
    if way.name == "ours":
        return our_step(config, device, way.compiled)
    if way.name == "transformers":
        model, loss_of = transformers_model(config)
    else:
        model, loss_of = checkout_model(Path(way.name), config)
    return their_step(model, loss_of, config, device, way.compiled)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # noqa: PLC0415 (not on Windows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts kilobytes


def our_step(config: Config, device: torch.device, compiled: bool) -> Step:
    train_config = configure(
        config.size, dtype=config.dtype, compile="on" if compiled else "off",
        batch_tokens=config.sequences * SIZES[config.size].block_size,
        micro_batch=config.sequences)
    run = build_run(train_config, ddp.World(0, 1, device))

    def take_step(x, y, step: int) -> float:
        loss, _, _ = train.train_step(run, x, y, step)
        return loss.item()

    return take_step


def configure(size: str, **options) -> TrainConfig:
    """The preset gpt2-124m, not compiled, with the sizes of another model."""
    sizes = SIZES[size]
    return dataclasses.replace(
        PRESETS["gpt2-124m"], **{
            "compile": "off", "n_layer": sizes.n_layer, "n_head": sizes.n_head,
            "n_embd": sizes.n_embd, "block_size": sizes.block_size, **options})


def build_run(config: TrainConfig, world: ddp.World) -> TrainingRun:
    """The part of a run that train_step uses: a model with random weights, and no data."""
    with torch.device("meta"):
        model = GPT(model_sizes(config, config.vocab_size))
    place_model(model, None, config, world)
    return TrainingRun(
        config, world, folder=Path(), data_checksums={}, tokenizer=None, model=model,
        ddp_model=ddp.wrap(model, world), optimizers=build_optimizers(model, config),
        scaler=create_scaler(config, world), batches=None, val_loader=None,
        hellaswag_examples=None, first_step=0, first_step_is_evaluated=False, log=None)


def their_step(model, loss_of: Callable, config: Config, device: torch.device,
               compiled: bool) -> Step:
    """A step of another model; loss_of(model, x, y) returns its loss."""
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    model.to(device)
    compiled_model = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=BETAS, fused=True)

    def take_step(x, y, step: int) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of(compiled_model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return take_step


# --------------------------------------------------------------------------------------------------
# The other models

def checkout_model(folder: Path, config: Config):
    """The model of build-nanogpt or nanoGPT, without running the rest of its script."""
    # execute only the imports, classes and functions
    path = next(path for path in (folder / "train_gpt2.py", folder / "model.py") if path.exists())
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if is_definition(node)]
    module = {"__name__": path.stem}
    sys.modules[path.stem] = type(sys)(path.stem)  # dataclasses look their module up
    exec(compile(tree, path, "exec"), module)

    # pass the sizes that its GPTConfig knows
    sizes = SIZES[config.size]
    values = {
        "block_size": sizes.block_size, "n_layer": sizes.n_layer, "n_head": sizes.n_head,
        "n_embd": sizes.n_embd, "vocab_size": VOCAB_SIZE, "dropout": 0.0, "bias": True}
    fields = {field.name for field in dataclasses.fields(module["GPTConfig"])}
    gpt_config = module["GPTConfig"](**{name: values[name] for name in fields & set(values)})
    return module["GPT"](gpt_config), lambda model, x, y: model(x, y)[1]


def is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "hellaswag" not in ast.unparse(node)
    return isinstance(node, ast.ClassDef | ast.FunctionDef)


def transformers_model(config: Config):
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (used in one process)
    sizes = SIZES[config.size]
    gpt_config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=sizes.block_size, n_embd=sizes.n_embd,
        n_layer=sizes.n_layer, n_head=sizes.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    # it shifts the labels itself, so it computes one position fewer of a thousand
    model = GPT2LMHeadModel(gpt_config).train()
    return model, lambda model, x, y: model(input_ids=x, labels=x).loss


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
