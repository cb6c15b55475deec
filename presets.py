"""What a run is: its configuration, and the presets, each a set of defaults."""
import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Literal

import optim
from errors import UserError
from shards import read_manifest


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


# GPT-3 paper, table 2.1 and appendix B: 0.5M tokens a batch, 6e-4, betas 0.9 and 0.95, clip 1.0, decay 0.1; its warm-up
# of 375M tokens is 715 steps, and 19,073 steps are 10B tokens.
GPT2_124M = TrainConfig(vocab_size=50_304, hellaswag="auto", samples=4)

# nanoGPT's baby GPT (with biases), 5000 steps of 64 x 256 characters.
SHAKESPEARE_CHAR = TrainConfig(
    data=Path("data/tiny_shakespeare_char"), n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
    batch_tokens=64 * 256, max_steps=5000, learning_rate=1e-3, warmup_steps=100, beta2=0.99,
    eval_every=250, sample_every=500, save_every=500, sample_prompt="ROMEO:\n")

# The same text for two CPU cores, where few layers, small batches and Muon bring the loss down soonest.
SHAKESPEARE_CHAR_CPU = dataclasses.replace(
    SHAKESPEARE_CHAR, n_layer=2, n_head=3, n_embd=96, block_size=64, dropout=0.0, batch_tokens=12 * 64, micro_batch=12,
    max_steps=1000, optimizer="muon", learning_rate=1e-2, warmup_steps=20, min_lr_ratio=0.0, eval_every=200,
    eval_tokens=20 * 12 * 64)

PRESETS = {
    "gpt2-124m": GPT2_124M,
    "shakespeare-char": SHAKESPEARE_CHAR,
    "shakespeare-char-cpu": SHAKESPEARE_CHAR_CPU,
    "shakespeare-bundled": dataclasses.replace(  # assets/bundled/shakespeare, under 4 MB in float16
        SHAKESPEARE_CHAR, n_layer=4, n_head=6, n_embd=192, batch_tokens=8 * 256, micro_batch=8, dropout=0.1, max_steps=4500,
        optimizer="muon", learning_rate=3e-3, min_lr_ratio=0.02),
    "pushkin-char": dataclasses.replace(SHAKESPEARE_CHAR, data=Path("data/tiny_pushkin_char"), sample_prompt="Я вас любил"),
    "finetune": TrainConfig(
        data=Path("data/finetune"), init_from="bundled", batch_tokens=32 * 1024, micro_batch=8, max_steps=200,
        learning_rate=3e-5, schedule="constant", warmup_steps=0, dropout=0.1, eval_every=20, sample_every=100,
        save_every=100),
}
PRESETS |= {  # two epochs, as nanoGPT's, and three
    "finetune-shakespeare": dataclasses.replace(
        PRESETS["finetune"], init_from="gpt2", data=Path("data/tiny_shakespeare_gpt2"), max_steps=20, eval_every=5),
    "finetune-pushkin": dataclasses.replace(
        PRESETS["finetune"], init_from="gpt2", data=Path("data/tiny_pushkin_gpt2"), max_steps=100, sample_prompt="Я вас любил"),
}

# Models that lie in assets/bundled, trained on two cores.
PRESETS |= {
    "edu-bundled": TrainConfig(
        data=Path("data/edu_corpus_bpe-4096"), n_layer=6, n_head=6, n_embd=192, block_size=256, batch_tokens=16 * 256,
        micro_batch=16, max_steps=5000, optimizer="muon", learning_rate=8e-3, schedule="wsd", warmup_steps=50, min_lr_ratio=0.0,
        eval_every=100, eval_tokens=2**16, sample_every=500, save_every=50, sample_prompt="The history of"),
    "pushkin-bundled": dataclasses.replace(
        PRESETS["shakespeare-bundled"], data=Path("data/tiny_pushkin_char"), dropout=0.0, max_steps=1600, learning_rate=6e-3,
        schedule="wsd", min_lr_ratio=0.0, sample_prompt="Я вас любил"),
}


def fast(config: TrainConfig) -> TrainConfig:
    """The recipe that won in benchmarks/recipes, for a configuration made for AdamW."""
    return dataclasses.replace(config, optimizer="muon", learning_rate=2 * config.learning_rate, embedding_rate=4.0,
                               max_steps=round(0.5 * config.max_steps), warmup_steps=round(0.5 * config.warmup_steps))


RECIPES = {"fast": fast}


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


def identity(config: TrainConfig, step: int) -> dict:
    """The part of a configuration that makes two runs the same run up to `step`; data are the same where their shards are. How
    long wsd will go on does not matter before its rate falls: such a run may be made longer, or be ended sooner."""
    shards = "".join(shard["sha256"] for shard in read_manifest(config.data).get("shards", ()))
    data = hashlib.sha256(shards.encode()).hexdigest()[:16] if shards else str(config.data)
    same = {name: value for name, value in plain(config).items() if name not in INCIDENTAL} | {"data": data}
    if config.schedule == "wsd" and step <= optim.falls_from(config.warmup_steps, config.max_steps):
        same["max_steps"] = "open"
    return same


def described(config: TrainConfig) -> dict:
    """The run's config.json: its configuration, and what its data are."""
    manifest = read_manifest(config.data)
    return {**plain(config), "corpus": {name: manifest[name] for name in ("source", "documents", "tokens") if name in manifest}}


def plain(config: TrainConfig) -> dict:
    """The configuration as JSON can hold it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}
