"""The configuration of a run: every option of train.py, and which of them make two runs the same.

`TrainConfig` is flat: each field is one command-line option, and its docstring is the help text.
"""
import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.errors import UserError
from training import optim


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run: its data, model, optimization, and what is evaluated, sampled and saved."""

    data: Path = Path("edu_fineweb10B")
    """Folder of token shards, as prepare.py writes it."""
    name: Annotated[str, tyro.conf.arg(aliases=["--run"])] = ""
    """Name of the run, whose folder is log/<name>. Defaults to the preset's name."""
    resume: Literal["auto", "none"] = "auto"
    """auto resumes from the newest checkpoint of the run. none starts a new run, and refuses a
    folder that already holds one."""
    init_from: str | None = None
    """Model whose weights and sizes the run starts from: bundled, a run, a file, a folder or a Hub
    id."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """Order of the sequences: a new permutation each epoch, or as they stand in the text."""
    seed: int = 1337

    # the model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    """Context in tokens, of the model and of a training sequence."""
    vocab_size: int | None = None
    """Defaults to the tokenizer's."""
    dropout: float = 0.0

    # the batch
    batch_tokens: int = 2**19
    """Tokens per step, over all processes and micro-batches."""
    micro_batch: int | Literal["auto"] = 64
    """Sequences that a process takes at a time; gradients accumulate until its share of the batch
    is done. auto halves that share until it fits in memory."""

    # the optimization
    recipe: Literal["preset", "fast"] = "preset"
    """fast trains in half of the preset's steps, with Muon and other learning rates (see
    benchmarks/recipes)."""
    max_steps: int = 19_073
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4
    embedding_rate: float = 1.0
    """Learning rate of the embeddings, as a multiple of the others'."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 715
    min_lr_ratio: float = 0.1
    """Final learning rate of cosine and wsd, as a fraction of the peak."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    # evaluation, samples, checkpoints and the log, all in steps
    eval_every: int = 250
    eval_tokens: int = 20 * 2**19
    """Validation tokens to score each time: the first of the split, at most this many."""
    hellaswag: str = "none"
    """Score HellaSwag with each validation: a .jsonl or .jsonl.gz of its examples, auto (download
    them) or none."""
    sample_every: int = 250
    save_every: int = 1000
    log_every: int = 10
    sample_prompt: str = "Hello, I'm a language model,"
    samples: int = 1
    """Continuations of the prompt to sample each time."""

    # the machine
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of the matrix products; auto is bfloat16 on CUDA and float32 elsewhere. Weights are
    always float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto does on CUDA."""
    shard: bool = False
    """Divide weights, gradients and optimizer state among the processes (FSDP2), for models that do
    not fit on one device."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass instead of keeping them; auto does with
    --shard."""
    deterministic: bool = False
    """Use slower CUDA kernels that give the same bits each time."""
    wait_s: float = 600
    """Seconds that a process waits for another before it gives up."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Send the log to this tracker too."""
    dry_run: bool = False
    """Print the plan of the run, and stop."""

    # assumptions of the plan, which do not change the run
    gpu: str | None = None
    """Device to plan for, such as a100 or h100. Defaults to this machine's."""
    nproc: int | None = None
    """Number of devices to plan for. Defaults to the number of processes."""
    mfu: float = 0.5
    """Assumed model FLOPs utilization: the fraction of the peak that the run reaches."""
    price: float = 0.0
    """Price of one device for an hour."""

    @property
    def recompute_activations(self) -> bool:
        """What --recompute comes to."""
        return self.recompute == "on" or (self.recompute == "auto" and self.shard)


AT_LEAST_ONE = ("batch_tokens", "micro_batch", "block_size", "eval_every", "eval_tokens",
                "sample_every", "save_every", "log_every", "samples")
NOT_NEGATIVE = ("max_steps", "price", "learning_rate", "embedding_rate", "warmup_steps",
                "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip")


def check(config: TrainConfig):
    """Raises UserError for a value that no run can have."""
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value != "auto" and value < 1:
            raise UserError(f"{option(name)} must be at least 1, not {value}.")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        limit = 1 if name.startswith("beta") else math.inf
        if not 0 <= value < limit:
            allowed = "at least 0 and below 1" if limit == 1 else "finite and at least 0"
            raise UserError(f"{option(name)} must be {allowed}, not {value}.")
    if config.wait_s <= 0:
        raise UserError(f"--wait-s must be above 0, not {config.wait_s}.")
    if not 0 < config.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, not {config.mfu}.")
    if config.nproc is not None and config.nproc < 1:
        raise UserError(f"--nproc must be at least 1, not {config.nproc}.")
    if config.shard and config.optimizer == "muon":
        raise UserError("Muon needs whole matrices, which --shard divides: use only one of them.")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", config.name):
        raise UserError("--name names a folder under log/ and may hold letters, digits, '.', '-' "
                        f"and '_', so it cannot be {config.name!r}.")


def option(field: str) -> str:
    """The command-line option of a field."""
    return "--" + field.replace("_", "-")


# --------------------------------------------------------------------------------------------------
# What makes two runs the same

# Options that may change when a run resumes: where it runs and what is shown, not what is computed.
# (`run` is what `name` was called in older checkpoints.)
MAY_CHANGE = {
    "name", "run", "recipe", "resume", "data", "micro_batch", "eval_every", "eval_tokens",
    "hellaswag", "sample_every", "save_every", "log_every", "sample_prompt", "samples", "device",
    "compile", "shard", "recompute", "deterministic", "wait_s", "track", "dry_run", "gpu", "nproc",
    "mfu", "price"}


def run_fingerprint(config: TrainConfig, manifest: dict, step: int) -> dict:
    """The part of a configuration that a resumed run must share with its checkpoint at `step`.

    Data are the same if their shards' checksums are. Before wsd's decay begins the rate does not
    depend on max_steps, so until then such a run may be made longer or shorter.
    """
    checksums = "".join(shard["sha256"] for shard in manifest.get("shards", ()))
    digest = hashlib.sha256(checksums.encode()).hexdigest()[:16]
    fingerprint = {name: value for name, value in as_json(config).items() if name not in MAY_CHANGE}
    fingerprint["data"] = digest if checksums else str(config.data)
    decay_starts = optim.decay_start(config.warmup_steps, config.max_steps)
    if config.schedule == "wsd" and step <= decay_starts:
        fingerprint["max_steps"] = "open"
    return fingerprint


def run_description(config: TrainConfig, manifest: dict) -> dict:
    """The contents of a run's config.json: its configuration and what its data are."""
    corpus = {key: manifest[key] for key in ("source", "documents", "tokens") if key in manifest}
    return {**as_json(config), "corpus": corpus}


def as_json(config: TrainConfig) -> dict:
    """The configuration with paths as strings."""
    fields = dataclasses.asdict(config).items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields}
