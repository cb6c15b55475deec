"""The plan of a run, printed before it starts: data, memory, time, cost and energy.

    python train.py gpt2-124m --dry-run --gpu a100 --nproc 8 --price 1.80   # needs no GPU or data

All figures are estimates, computed from the model's sizes and the data sheets in
common/devices.py.
"""
import dataclasses
import math

from common.devices import DEVICES, KG_CO2E_PER_KWH, Device, find_device
from common.errors import UserError
from dataloader import DataLoader
from model import GPT
from training.config import TrainConfig
from training.loss import LOGIT_ROWS


def describe(config: TrainConfig, model: GPT, train_loader: DataLoader | None,
             val_loader: DataLoader | None, device_name: str, processes: int) -> str:
    """The plan as a few lines of text. The loaders are None if the data do not exist yet.

    --gpu and --nproc override the device's name and the number of processes.
    """
    device_name = config.gpu or device_name
    processes = config.nproc or processes
    device = find_device(device_name)  # None for a CPU or an unknown GPU
    if config.gpu and not device:
        raise UserError(f"No data sheet of {config.gpu!r} found: choose --gpu from "
                        f"{', '.join(DEVICES)}.")
    sequences = config.batch_tokens // config.block_size
    if sequences % processes:
        raise UserError(f"The {sequences:,} sequences of a batch do not divide evenly among "
                        f"{processes} processes: change --batch-tokens or their number.")

    rates = f"{config.optimizer}, {config.schedule} learning rate of {config.learning_rate:g}"
    if config.embedding_rate != 1:
        rates += f" ({config.embedding_rate:g} times that for the embeddings)"
    lines = [
        f"{config.name}: {model.num_parameters():,} parameters, on {processes} x {device_name}",
        describe_data(config, train_loader, val_loader),
        describe_memory(config, model, processes, device),
        rates,
    ]
    if device:
        lines += describe_time(config, model, processes, device)
    return "\n".join(lines)


def describe_data(config: TrainConfig, train_loader: DataLoader | None,
                  val_loader: DataLoader | None) -> str:
    tokens = config.max_steps * config.batch_tokens
    text = f"{config.max_steps:,} steps of {config.batch_tokens:,} tokens = {tokens:,} tokens"
    if train_loader is None:
        return f"{text}; no data in {config.data} yet"
    epoch = train_loader.sequences * config.block_size
    text += (f": {tokens / epoch:.1f} epochs of {len(train_loader.shards):,} tokens "
             f"(the last {train_loader.tail} unused)")
    if tokens > epoch:
        text += f", repeating from step {epoch // config.batch_tokens + 1:,}"
    return f"{text}; {len(val_loader.shards):,} validation tokens"


# --------------------------------------------------------------------------------------------------
# Memory

def describe_memory(config: TrainConfig, model: GPT, processes: int, device: Device | None) -> str:
    is_half = config.dtype.endswith("16") or (config.dtype == "auto" and device is not None)
    is_auto = config.micro_batch == "auto"
    share = config.batch_tokens // config.block_size // processes  # of a batch, in sequences
    sequences = share if is_auto else min(config.micro_batch, max(1, share))
    config = dataclasses.replace(config, micro_batch=sequences)
    held = bytes_held(config, model, processes, is_half, "cuda" if device else "cpu")
    total = sum(held.values())
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items())
    text = (f"memory per process: {parts} with a micro-batch of {sequences} sequences; "
            f"{format_bytes(total)}")
    if device:
        text += f" of {format_bytes(device.memory_bytes)}"
        if total > 0.95 * device.memory_bytes:
            advice = "auto will lower the micro-batch" if is_auto else "lower --micro-batch"
            text += f", which does not fit: {advice}"
    return text


def bytes_held(config: TrainConfig, model: GPT, processes: int, is_half: bool,
               device: str) -> dict[str, float]:
    """Peak memory of one process by kind, for a micro-batch of config.micro_batch sequences.

    `is_half` says whether matrix products are in bfloat16 or float16.
    """
    tokens = config.micro_batch * config.block_size
    activations = activation_bytes(model, tokens, is_half, config.recompute_activations, device)
    parts = 1
    if config.shard:
        parts = processes
        # besides its own parts, a process holds the gathered weights of the embeddings and of two
        # blocks, and the gradients of one block
        block = sum(p.numel() for p in model.transformer.h[0].parameters())
        gathered = 2 * model.transformer.wte.weight.numel() + 3 * block
        activations += (2 if is_half else 4) * gathered
    weights = 4 * model.num_parameters() / parts
    return {"weights": weights,
            "gradients": weights,
            "optimizer": optimizer_bytes(config, model) / parts,
            "activations (estimate)": activations}


def optimizer_bytes(config: TrainConfig, model: GPT) -> int:
    """AdamW keeps two float32 moments per parameter; Muon keeps one per entry of a matrix."""
    size = 8 * model.num_parameters()
    if config.optimizer == "muon":
        size -= 4 * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    return size


def activation_bytes(model: GPT, tokens: int, is_half: bool, recomputed: bool = False,
                     device: str = "cpu") -> int:
    """Peak memory of a step for `tokens` tokens, without weights, gradients and optimizer state.

    The formula counts what autograd keeps, with C = n_embd and V = vocab_size. A test compares it
    with the measured peak.
    """
    C, V, n_layer = model.config.n_embd, model.config.vocab_size, model.config.n_layer
    rows = LOGIT_ROWS[device]

    # A block keeps 16 C numbers per token in float32, or 2 C in float32 and 14 C in half
    # precision. Dropout keeps two masks of C bytes.
    block = tokens * C * (36 if is_half else 64)
    if model.config.dropout:
        block += tokens * 2 * C

    # The loss keeps 3 V float32 numbers per token. In chunks it keeps 2 V for some rows (and a copy
    # in half precision), and the gradients of the hidden states and of the head.
    if tokens <= rows:
        logits = tokens * 12 * V
    else:
        logits = rows * V * (10 if is_half else 8)
        logits += tokens * C * (2 if is_half else 4)
        logits += 4 * V * C

    # The input and the output of the last LayerNorm.
    kept = tokens * C * (6 if is_half else 8)

    # Autocast's copies of the weights.
    copies = 2 * model.num_parameters() if is_half else 0

    if not recomputed:
        return n_layer * block + logits + kept + copies
    # With recomputation only the input of each block is kept, and only one block or the loss is
    # computed at a time.
    return max(block, logits) + kept + tokens * C * 4 * n_layer + copies // n_layer


# --------------------------------------------------------------------------------------------------
# Time, cost, energy

def describe_time(config: TrainConfig, model: GPT, processes: int, device: Device) -> list[str]:
    """Two lines: time and cost, and energy. Both leave out evaluation."""
    if config.dtype == "float32":
        return ["time: unknown, as the data sheets give the speed in half precision only"]

    # compute at the assumed fraction of the peak
    flops = model.flops_per_token(config.block_size) * config.batch_tokens
    compute_s = flops / (processes * device.flops * config.mfu)

    # Communicate, without overlapping it with computing. A ring all-reduce of the float32 gradients
    # moves 8 bytes per parameter. FSDP2 moves as much for each micro-batch: it gathers the weights
    # in bfloat16 twice, and scatters the gradients in float32.
    passes = 1
    if config.shard and config.micro_batch != "auto":
        sequences = config.batch_tokens // config.block_size // processes
        passes = math.ceil(sequences / config.micro_batch)
    bytes_sent = 8 * passes * (processes - 1) / processes * model.num_parameters()
    communication_s = bytes_sent / device.link

    step_s = compute_s + communication_s
    tokens_per_s = config.batch_tokens / step_s
    hours = step_s * config.max_steps / 3600
    cost = processes * hours * config.price
    kwh = processes * device.watts / 1000 * hours

    communication = "gather weights and sum gradients" if config.shard else "sum gradients"
    time = (f"time without evaluation: {1000 * compute_s:,.0f} ms per step to compute at "
            f"{config.mfu:.0%} of {device.flops / 1e12:,.0f} TFLOP/s, and "
            f"{1000 * communication_s:,.0f} ms to {communication} at "
            f"{device.link / 1e9:,.0f} GB/s; {tokens_per_s:,.0f} tokens/s, {hours:,.1f} hours")
    if cost:
        time += f"; cost {cost:,.2f} at {config.price:g} per device and hour"
    energy = (f"energy: at most {kwh:,.1f} kWh, {kwh * KG_CO2E_PER_KWH:,.1f} kg CO2e at the world "
              f"average of {KG_CO2E_PER_KWH} kg per kWh")
    return [time, energy]


def format_bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
