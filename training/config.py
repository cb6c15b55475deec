"""The configuration of a run, and which parts of it make two runs the same."""
import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Literal

from common.errors import UserError
from shards import read_manifest
from training import optim


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run: its data, its model, its optimization, what is measured on the way."""

    data: Path = Path("edu_fineweb10B")
    """Folder of token shards, as prepare.py writes it."""
    run: str = ""
    """The run is the folder log/<run>; the preset's name when not given."""
    resume: Literal["auto", "none"] = "auto"
    """auto goes on from the run's newest checkpoint; none starts, and refuses a folder that holds a run."""
    init_from: str | None = None
    """A model to start from, under any of its names; its sizes are then the model's."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """Of the sequences: a new permutation each epoch, or as they stand in the text."""
    seed: int = 1337

    # The model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    """Tokens of context, in the model and in a training sequence."""
    vocab_size: int | None = None
    """The tokenizer's when not given."""
    dropout: float = 0.0

    # The batch
    batch_tokens: int = 2**19
    """Tokens a step, over all processes and micro-batches."""
    micro_batch: int | Literal["auto"] = 64
    """Sequences a process takes at a time; gradients accumulate until its share of the batch is done. auto halves that share
    until it fits the device, once for a run."""

    # The optimization
    recipe: Literal["preset", "fast"] = "preset"
    """fast is the preset in half of the steps, with Muon and other rates, as benchmarks/recipes found them."""
    max_steps: int = 19_073
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4
    embedding_rate: float = 1.0
    """The learning rate of the embeddings, as a multiple of the others'."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 715
    min_lr_ratio: float = 0.1
    """The end of cosine and wsd, as a share of the learning rate."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""

    # What is measured, shown and kept, in steps
    eval_every: int = 250
    eval_tokens: int = 20 * 2**19
    """At most this many validation tokens are scored each time, the first of the split."""
    hellaswag: str = "none"
    """Score HellaSwag with each validation: a .jsonl or .jsonl.gz of its examples; auto downloads them; none does not."""
    sample_every: int = 250
    save_every: int = 1000
    log_every: int = 10
    sample_prompt: str = "Hello, I'm a language model,"
    samples: int = 1
    """Continuations of the prompt at a time."""

    # The machine
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of the matrix products; auto is bfloat16 on CUDA. The weights are float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto does on CUDA."""
    shard: bool = False
    """Divide weights, gradients and optimizer among the processes (FSDP2), for models that one device does not hold. Gradients
    cross with every micro-batch then, and in bfloat16 activations are in it too."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Compute activations again in the backward pass instead of keeping them; auto does with --shard."""
    deterministic: bool = False
    """The same bits each time on CUDA too, by slower kernels."""
    wait_s: float = 600
    """Seconds that a process waits for another before it gives up."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Send the log there too."""
    dry_run: bool = False
    """Print what the run would be, and stop."""

    # What the plan is made for; these change no run
    gpu: str | None = None
    """A device by its name, such as a100 or h100; the one here when not given."""
    nproc: int | None = None
    """Processes, one a device; those there are when not given."""
    mfu: float = 0.5
    """Share of the devices' peak that the products reach."""
    price: float = 0.0
    """Of a device for an hour."""


def check(config: TrainConfig):
    """Raises UserError for a value that no run can have."""
    for name in ("batch_tokens", "micro_batch", "block_size", "eval_every", "eval_tokens", "sample_every", "save_every",
                 "log_every", "samples", "max_steps"):
        if getattr(config, name) != "auto" and getattr(config, name) < (name != "max_steps"):
            raise UserError(f"--{name.replace('_', '-')} is at least {int(name != 'max_steps')}, not {getattr(config, name)}.")
    if config.wait_s <= 0:
        raise UserError(f"--wait-s is above 0, not {config.wait_s}.")
    if not 0 < config.mfu <= 1 or (config.nproc is not None and config.nproc < 1):
        raise UserError("--mfu is a share above 0 and at most 1, and --nproc at least 1.")
    if config.shard and config.optimizer == "muon":
        raise UserError("Muon needs whole matrices, which --shard divides: leave one of the two out.")
    for name in ("price", "learning_rate", "embedding_rate", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1", "beta2",
                 "grad_clip"):
        if not 0 <= getattr(config, name) < (1 if name.startswith("beta") else math.inf):
            raise UserError(f"--{name.replace('_', '-')} cannot be {getattr(config, name)}.")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", config.run):
        raise UserError(f"--run names a folder under log/, with letters, digits, '.', '-' and '_': {config.run!r}.")


def recomputes(config: TrainConfig) -> bool:
    return config.recompute == "on" or (config.recompute == "auto" and config.shard)


# What may differ when a run goes on: where it runs and what is shown, not what is computed.
INCIDENTAL = {"run", "recipe", "resume", "data", "micro_batch", "eval_every", "eval_tokens", "hellaswag", "sample_every",
              "save_every", "log_every", "sample_prompt", "samples", "device", "compile", "shard", "recompute", "deterministic",
              "wait_s", "track", "dry_run", "gpu", "nproc", "mfu", "price"}


def run_fingerprint(config: TrainConfig, step: int) -> dict:
    """The part of a configuration that makes two runs the same run up to `step`; data are the same where their shards are. How
    long wsd will go on does not matter before its rate falls: such a run may be made longer, or be ended sooner."""
    shards = "".join(shard["sha256"] for shard in read_manifest(config.data).get("shards", ()))
    data = hashlib.sha256(shards.encode()).hexdigest()[:16] if shards else str(config.data)
    same = {name: value for name, value in plain(config).items() if name not in INCIDENTAL} | {"data": data}
    if config.schedule == "wsd" and step <= optim.falls_from(config.warmup_steps, config.max_steps):
        same["max_steps"] = "open"
    return same


def run_description(config: TrainConfig) -> dict:
    """The run's config.json: its configuration, and what its data are."""
    manifest = read_manifest(config.data)
    return {**plain(config), "corpus": {name: manifest[name] for name in ("source", "documents", "tokens") if name in manifest}}


def plain(config: TrainConfig) -> dict:
    """The configuration as JSON can hold it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}
