"""A run before it starts: what it learns, what memory it takes, how long it lasts, what it costs.

    python train.py gpt2-124m --dry-run --gpu a100 --nproc 8 --price 1.80        # needs no GPU, and no data
"""
import dataclasses
import math

from common.devices import DEVICES, KG_CO2E_PER_KWH, Device, find_device
from common.errors import UserError
from dataloader import DataLoader
from model import GPT
from training.config import TrainConfig, recomputes
from training.loss import LOGIT_ROWS


def describe(config: TrainConfig, model: GPT, train_loader: DataLoader | None, val_loader: DataLoader | None,
             device_name: str, processes: int) -> str:
    """The plan in a few lines; the loaders are None where there are no data yet."""
    device, processes = find_device(config.gpu or device_name), config.nproc or processes
    if config.gpu and not device:
        raise UserError(f"The data sheet of {config.gpu!r} is not known here; known are: {', '.join(DEVICES)}.")
    if config.batch_tokens // config.block_size % processes:
        raise UserError(f"The {config.batch_tokens // config.block_size:,} sequences of a batch do not divide among {processes} "
                        "processes.")
    name = config.gpu or device_name
    lines = [f"{config.run}: {model.num_parameters():,} parameters, on {processes} x {name}",
             learned(config, train_loader, val_loader), memory(config, model, processes, device)]
    lines.append(f"{config.optimizer} at {config.learning_rate:g}" + f", the embeddings at {config.embedding_rate:g} times that"
                 * (config.embedding_rate != 1) + f", {config.schedule}")
    return "\n".join([*lines, *(duration(config, model, processes, device) if device else [])])


def learned(config: TrainConfig, train_loader: DataLoader | None, val_loader: DataLoader | None) -> str:
    tokens = config.max_steps * config.batch_tokens
    text = f"{config.max_steps:,} steps of {config.batch_tokens:,} tokens = {tokens:,} tokens"
    if train_loader is None:
        return f"{text}; there are no data in {config.data} yet"
    epoch = train_loader.sequences * config.block_size
    again = f", from step {epoch // config.batch_tokens + 1:,} on seen before" if tokens > epoch else ""
    return (f"{text}: {tokens / epoch:.1f} epochs of {len(train_loader.shards):,} ({train_loader.tail} left out as a tail"
            f"{again}); {len(val_loader.shards):,} for validation")


def memory(config: TrainConfig, model: GPT, processes: int, device: Device | None) -> str:
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device is not None)
    share = config.batch_tokens // config.block_size // processes
    sequences = share if config.micro_batch == "auto" else min(config.micro_batch, max(1, share))
    held = bytes_held(dataclasses.replace(config, micro_batch=sequences), model, processes, bfloat16)
    whole = sum(held.values())
    there = f" of {memory_size(device.memory_bytes)}" if device else ""
    warning = ""
    if device and whole > 0.95 * device.memory_bytes:
        warning = ", which is too little: " + ("auto takes fewer" if config.micro_batch == "auto" else "lower --micro-batch")
    parts = ", ".join(f"{name} {memory_size(size)}" for name, size in held.items())
    return f"memory of each: {parts} with {sequences} sequences at a time; {memory_size(whole)}{there}{warning}"


def bytes_held(config: TrainConfig, model: GPT, processes: int, bfloat16: bool) -> dict[str, float]:
    """What a process holds of each kind, at the most, with config.micro_batch sequences at a time."""
    tokens, share = config.micro_batch * config.block_size, processes if config.shard else 1
    activations = activation_bytes(model, tokens, bfloat16, recomputes(config), "cuda" if bfloat16 else "cpu")
    if config.shard:  # the embeddings, and two blocks, are gathered; so are a block's gradients
        block = sum(p.numel() for p in model.transformer.h[0].parameters())
        activations += (2 if bfloat16 else 4) * (2 * model.transformer.wte.weight.numel() + 3 * block)
    weights = 4 * model.num_parameters() / share
    return {"weights": weights, "gradients": weights, "optimizer": optimizer_bytes(config, model) / share,
            "activations about": activations}


def optimizer_bytes(config: TrainConfig, model: GPT) -> int:
    """AdamW keeps two float32 moments of a parameter, Muon one of a hidden matrix."""
    hidden = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    return 8 * model.num_parameters() - (4 * hidden if config.optimizer == "muon" else 0)


def activation_bytes(model: GPT, tokens: int, bfloat16: bool, recomputed: bool = False, device: str = "cpu") -> int:
    """The most that a step holds for its backward pass, beyond weights, gradients and optimizer. As counted: autograd keeps
    16 · C numbers a token of a block (under bfloat16 two of C in float32, and 14); of the logits three times V in float32, or of
    a few rows twice V, and the embedding's gradient. Recomputed, a block's input is kept, and one block is there at a time."""
    c, rows = model.config, LOGIT_ROWS[device]
    blocks = tokens * (c.n_embd * (36 if bfloat16 else 64) + (2 * c.n_embd if c.dropout else 0))
    logits = 12 * tokens * c.vocab_size
    if tokens > rows:
        logits = ((10 if bfloat16 else 8) * rows * c.vocab_size + tokens * c.n_embd * (2 if bfloat16 else 4)
                  + 4 * c.vocab_size * c.n_embd)
    most = max(blocks, logits) if recomputed else c.n_layer * blocks + logits
    kept = tokens * c.n_embd * ((6 if bfloat16 else 8) + (4 * c.n_layer if recomputed else 0))
    in_bfloat16 = 2 * model.num_parameters() // (c.n_layer if recomputed else 1) if bfloat16 else 0  # copies of the weights
    return most + kept + in_bfloat16


def duration(config: TrainConfig, model: GPT, processes: int, device: Device) -> list[str]:
    """Time, price, energy: the products at the stated share of the peak, and then the gradients' sum, not overlapped."""
    if config.dtype == "float32":
        return ["time: not stated, as the data sheets here are of bfloat16"]
    flops = model.flops_per_token(config.block_size) * config.batch_tokens
    products_s = flops / (processes * device.flops * config.mfu)
    # A ring all-reduce of float32; sharded, for each micro-batch, two gatherings in bfloat16 and one scattering in float32.
    sequences = config.batch_tokens // config.block_size // processes
    passes = math.ceil(sequences / config.micro_batch) if config.shard and config.micro_batch != "auto" else 1
    sum_s = 8 * passes * (processes - 1) / processes * model.num_parameters() / device.link
    step_s = products_s + sum_s
    hours = step_s * config.max_steps / 3600
    kwh = processes * device.watts / 1000 * hours
    cost = processes * hours * config.price
    price = f"; it costs {cost:,.2f}, at {config.price:g} an hour for each device" if cost else ""
    what = "gather weights and sum gradients" if config.shard else "sum gradients"
    return [f"time, evaluation aside: {1000 * products_s:,.0f} ms a step at {config.mfu:.0%} of {device.flops / 1e12:,.0f} "
            f"TFLOP/s, and {1000 * sum_s:,.0f} ms to {what} at {device.link / 1e9:,.0f} GB/s; "
            f"{config.batch_tokens / step_s:,.0f} tokens/s, {hours:,.1f} hours{price}",
            f"energy: {kwh:,.1f} kWh at most, {kwh * KG_CO2E_PER_KWH:,.1f} kg CO2e at the world's mean of {KG_CO2E_PER_KWH} kg "
            "a kWh"]


def memory_size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"
