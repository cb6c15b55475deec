"""The configuration of a run: the options of train.py, their checks, and a run's fingerprint.

`TrainConfig` is flat: each field is one command-line option. Its help text is the comment beside
it, or the text below it.
"""
import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.errors import UserError, check_range
from dataloader import Order
from shards import sample_checksum


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of a run. The defaults are those of GPT-2 124M on FineWeb-Edu."""

    data: Path = Path("edu_fineweb10B")  # Folder of token shards, as prepare.py writes it.
    name: Annotated[str, tyro.conf.arg(aliases=["--run"])] = ""
    """Name of the run, whose folder is log/<name>. Defaults to the preset's name."""
    resume: Literal["auto", "none"] = "auto"
    """auto resumes from the newest checkpoint of the run. none starts a new run, and fails if the
    folder already holds one."""
    init_from: str | None = None
    """Model to start from, with its weights and sizes: bundled, a run, a file, a folder or a Hub
    id."""
    order: Order = "shuffled"
    """shuffled: each epoch has the sequences in a new order. documents: each epoch first puts the
    documents in a new order, so the sequences change too. sequential: the order of the text."""
    seed: int = 1337

    # the model
    n_layer: int = 12  # Number of blocks.
    n_head: int = 12  # Attention heads of a block.
    n_embd: int = 768  # Width of the residual stream.
    block_size: int = 1024  # Context length in tokens, also that of a training sequence.
    vocab_size: int | None = None  # Defaults to the size of the tokenizer's vocabulary.
    dropout: float = 0.0

    # the batch
    batch_tokens: int = 2**19  # Tokens per step, over all processes and micro-batches.
    micro_batch: int | Literal["auto"] = 64
    """Sequences that a process computes at a time, accumulating gradients over its share of the
    batch. auto halves that share until it fits in memory."""

    # the optimization
    recipe: Literal["preset", "fast"] = "preset"
    """fast trains with Muon and higher learning rates, in half of the preset's steps (see
    benchmarks/recipes)."""
    max_steps: int = 19_073
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4
    embedding_rate: float = 1.0
    """Learning rate of the embeddings, as a multiple of --learning-rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. wsd stays constant, then decays over the last steps."""
    warmup_steps: int = 715
    min_lr_ratio: float = 0.1  # Final learning rate of cosine and wsd, as a fraction of the peak.
    decay_ratio: float = 0.2  # Fraction of the steps over which wsd decays the learning rate.
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # Maximum norm of the gradient; 0 turns clipping off.

    # evaluation, samples, checkpoints and the log, all in steps
    eval_every: int = 250  # Steps from one validation to the next.
    eval_tokens: int = 20 * 2**19
    """Number of validation tokens to score each time, from the start of the split."""
    hellaswag: str = "none"
    """Examples of HellaSwag to score with each validation: a .jsonl or .jsonl.gz file, auto
    (download them) or none."""
    sample_every: int = 250
    save_every: int = 1000
    log_every: int = 10
    sample_prompt: str = "Hello, I'm a language model,"
    samples: int = 1  # Number of continuations of the prompt to sample each time.

    # the machine
    device: str = "auto"  # auto, cuda, mps or cpu.
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights are always float32. auto is bfloat16 on hardware
    that computes it (CUDA 8.0 and newer, CPUs with AVX512_BF16 or AMX), float16 on older CUDA
    devices, else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto does so on CUDA devices that Triton supports."""
    shard: bool = False
    """Divide weights, gradients and optimizer state among the processes (FSDP2), for models that do
    not fit on one device."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass to save memory; auto does so with --shard."""
    deterministic: bool = False
    """Use only deterministic kernels, which may be slower, so that runs repeat bit for bit."""
    wait_s: float = 600  # Seconds to wait for another process before giving up.
    track: Literal["none", "trackio", "wandb"] = "none"  # Send the metrics to this tracker too.
    dry_run: bool = False  # Print the plan of the run and exit.

    # assumptions of the plan, which do not change the run
    gpu: str | None = None  # Device to plan for, such as a100 or h100. Defaults to this machine's.
    nproc: int | None = None  # Number of devices to plan for. Defaults to the number of processes.
    mfu: float = 0.5  # Assumed model FLOPs utilization (MFU), as a fraction of the device's peak.
    price: float = 0.0  # Price of one device per hour.

    @property
    def recompute_activations(self) -> bool:
        """The value of --recompute with "auto" resolved."""
        return self.recompute == "on" or (self.recompute == "auto" and self.shard)

    @property
    def decay_start(self) -> float:
        """The step at which the schedule "wsd" begins to decay.

        Before it, the learning rate depends on neither max_steps nor decay_ratio.
        """
        return max(self.warmup_steps, (1 - self.decay_ratio) * self.max_steps)


def validate(config: TrainConfig):
    """Raises UserError if a value is out of range, or if two options exclude each other."""
    check_range(config, "at least 1", lambda n: n >= 1,
                "batch_tokens", "micro_batch", "block_size", "eval_every", "eval_tokens",
                "sample_every", "save_every", "log_every", "samples", "nproc")
    check_range(config, "finite and at least 0", lambda x: 0 <= x < math.inf,
                "max_steps", "learning_rate", "embedding_rate", "warmup_steps", "min_lr_ratio",
                "weight_decay", "grad_clip", "price")
    check_range(config, "at least 0 and below 1", lambda x: 0 <= x < 1, "beta1", "beta2")
    check_range(config, "above 0", lambda x: x > 0, "wait_s")
    check_range(config, "above 0 and at most 1", lambda x: 0 < x <= 1, "decay_ratio", "mfu")
    if config.shard and config.optimizer == "muon":
        raise UserError("Muon needs whole matrices, which --shard divides: use --optimizer adamw "
                        "or leave out --shard.")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", config.name):
        raise UserError("--name names a folder under log/ and may contain letters, digits, '.', "
                        f"'-' and '_' only, so it cannot be {config.name!r}.")


# --------------------------------------------------------------------------------------------------
# What a run saves of its configuration

# Options that may change when a run resumes, as they do not change what it computes.
MAY_CHANGE = {
    "name", "recipe", "resume", "data", "micro_batch", "eval_every", "eval_tokens", "hellaswag",
    "sample_every", "save_every", "log_every", "sample_prompt", "samples", "device", "compile",
    "shard", "recompute", "deterministic", "wait_s", "track", "dry_run", "gpu", "nproc", "mfu",
    "price"}


def checksum_data(data: Path, manifest: dict) -> dict:
    """Checksums that tell whether a run's data have changed.

    "data" covers the checksums in the manifest; without a manifest it is the path of the folder.
    "data_sample" covers a sample of the tokens, in case files were replaced.
    """
    checksums = "".join(shard["sha256"] for shard in manifest.get("shards", ()))
    digest = hashlib.sha256(checksums.encode()).hexdigest()[:16]
    return {"data": digest if checksums else str(data),
            "data_sample": sample_checksum(data, manifest)}


def run_fingerprint(config: TrainConfig, data_checksums: dict, step: int) -> dict:
    """The values that must not change when a run resumes from its checkpoint at `step`.

    `data_checksums` are those of `checksum_data`. Until the schedule "wsd" begins to decay,
    max_steps and decay_ratio may still change.
    """
    fingerprint = {name: value for name, value in as_json(config).items() if name not in MAY_CHANGE}
    if config.schedule == "wsd" and step <= config.decay_start:
        fingerprint["max_steps"] = "open"
        del fingerprint["decay_ratio"]
    return fingerprint | data_checksums


def run_description(config: TrainConfig, manifest: dict) -> dict:
    """The contents of a run's config.json: its configuration, and a description of its data."""
    corpus = {key: manifest[key] for key in ("source", "documents", "tokens") if key in manifest}
    return {**as_json(config), "corpus": corpus}


def as_json(config: TrainConfig) -> dict:
    """The configuration with its path as a string."""
    return dataclasses.asdict(config) | {"data": str(config.data)}
