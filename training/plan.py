"""The plan of a run, printed before it starts: data, memory, time, cost and energy.

    python train.py gpt2-124m --dry-run --gpu a100 --nproc 8 --price 1.80   # needs no GPU or data

All figures are estimates, computed from the model's sizes and the data sheets in
common/devices.py.
"""
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
    held = bytes_held(config, model, sequences, processes, is_half, "cuda" if device else "cpu")
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


def bytes_held(config: TrainConfig, model: GPT, sequences: int, processes: int, is_half: bool,
               device: str) -> dict[str, float]:
    """Peak memory of one process by kind, for a micro-batch of this many sequences.

    `is_half` says whether matrix products are in bfloat16 or float16.
    """
    weights = 4 * model.num_parameters()
    parts = processes if config.shard else 1
    return {"weights": weights / parts,
            "gradients": weights / parts,
            "optimizer": optimizer_bytes(config, model) / parts,
            "activations (estimate)": activation_bytes(
                model, sequences * config.block_size, is_half,
                config.recompute_activations, device, config.shard)}


def optimizer_bytes(config: TrainConfig, model: GPT) -> int:
    """AdamW keeps two float32 moments per parameter; Muon keeps one per entry of a matrix."""
    size = 8 * model.num_parameters()
    if config.optimizer == "muon":
        size -= 4 * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    return size


def activation_bytes(model: GPT, tokens: int, is_half: bool, recomputed: bool = False,
                     device: str = "cpu", sharded: bool = False) -> int:
    """Peak memory of a step for `tokens` tokens, without weights, gradients and optimizer state.

    This counts the tensors that autograd keeps, with C = n_embd and V = vocab_size. Tests compare
    it with the peak measured on a CPU and counted on simulated GPUs.
    """
    sizes = model.config
    C, V, n_layer = sizes.n_embd, sizes.vocab_size, sizes.n_layer
    size = 2 if is_half else 4  # bytes of a number
    residual_size = 2 if is_half and sharded else 4  # autocast keeps the residual stream float32
    rows = LOGIT_ROWS[device]

    # Per token, a block keeps 2 C numbers of the residual stream and 14 C others; dropout adds two
    # masks of C bytes. CUDA has no fused attention for heads larger than 256: such a head also
    # keeps T scores per token, of about 10 bytes each.
    block = tokens * C * (2 * residual_size + 14 * size)
    if sizes.dropout:
        block += tokens * 2 * C
    if C // sizes.n_head > 256:
        block += tokens * sizes.block_size * sizes.n_head * 10

    # The loss keeps 3 V float32 numbers per token. Computed in chunks, it keeps 2 V for each row of
    # one chunk, with a copy in half precision, and the gradients of the hidden states and the head.
    if tokens <= rows:
        loss = tokens * 12 * V
    else:
        loss = rows * V * (10 if is_half else 8) + tokens * C * size + 4 * V * C

    # The model keeps the input and the output of the last LayerNorm. With recomputation it also
    # keeps each block's input; the backward pass then needs the memory of one block, or of the
    # loss, at a time.
    kept = tokens * C * (residual_size + size)
    if recomputed:
        kept += tokens * C * residual_size * n_layer
    else:
        kept += n_layer * block
        block = 0

    # A sharded model holds the gathered embeddings and, during the blocks' backward pass, their
    # gradients, the weights of two blocks, and one block's gradients in both precisions. Any other
    # model in half precision holds autocast's copies of the weights.
    if sharded:
        loss += size * count(model.transformer.wte, model.transformer.wpe)
        block += 2 * size * count(model.transformer.wte, model.transformer.wpe)
        block += (3 * size + 4) * count(model.transformer.h[0])
    elif is_half:
        kept += 2 * count(model) // (n_layer if recomputed else 1)
    return max(block, loss) + kept


def count(*modules) -> int:
    """The number of parameters in the modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


# --------------------------------------------------------------------------------------------------
# Time, cost, energy

def describe_time(config: TrainConfig, model: GPT, processes: int, device: Device) -> list[str]:
    """A line of time and cost, and one of energy, both without evaluation."""
    if config.dtype == "float32":
        return ["time: unknown, as the data sheets give the speed in half precision only"]

    # compute at the assumed fraction of the peak
    flops = model.flops_per_token(config.block_size) * config.batch_tokens
    compute_s = flops / (processes * device.flops * config.mfu)

    # communicate, without overlapping it with computing
    communication_s = bytes_sent(config, model, processes) / device.link

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


def bytes_sent(config: TrainConfig, model: GPT, processes: int) -> float:
    """Bytes that a process sends in a step.

    A ring all-reduce of the float32 gradients moves 8 bytes per parameter. FSDP2 moves as much for
    each micro-batch: it gathers the weights in bfloat16 twice, and scatters the float32 gradients.
    """
    passes = 1
    if config.shard and config.micro_batch != "auto":
        sequences = config.batch_tokens // config.block_size // processes
        passes = math.ceil(sequences / config.micro_batch)
    return 8 * passes * (processes - 1) / processes * model.num_parameters()


def format_bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
