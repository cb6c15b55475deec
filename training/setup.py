"""Set-up of a run: everything that train.py does once, before the first step."""
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils._triton import has_triton

import checkpoint
import ddp
import hellaswag
from common.errors import UserError
from common.seed import derive_seed
from corpus.sources import NAMED_TEXTS
from dataloader import DataLoader
from model import GPT, GPTConfig
from shards import read_manifest, read_tokenizer
from tokenizer import Tokenizer
from training import optim, plan, runlog, sharding
from training.config import TrainConfig, checksum_data, run_description, run_fingerprint


@dataclasses.dataclass
class TrainingRun:
    """Everything that the training loop uses."""

    config: TrainConfig  # with the actual sizes of the model and the micro-batch
    world: ddp.World
    folder: Path  # log/<name>
    data_checksums: dict
    tokenizer: Tokenizer
    model: GPT
    ddp_model: nn.Module  # the same model, wrapped to average gradients over the ranks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of the loss, so that float16 gradients do not underflow
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]]  # this rank's x, y (B / world, T) each
    val_loader: DataLoader
    hellaswag_examples: list[dict] | None
    first_step: int  # updates taken before this process started
    first_step_is_evaluated: bool  # False for a new run, and if a signal ended the last one
    log: runlog.Log | None  # on the main process only


def set_up(config: TrainConfig, world: ddp.World) -> TrainingRun | None:
    """Prepares the run that `config` describes, and loads its newest checkpoint if it has one.

    Returns None after printing the plan if config.dry_run is set. Raises UserError if the data, the
    model of --init-from or the checkpoint do not fit the configuration.
    """
    if not config.data.is_dir():
        return plan_without_data(config, world)

    # find the checkpoint to resume from
    folder = checkpoint.LOG / config.name
    first_step = find_checkpoint(config, folder, world)

    # build the model on the meta device
    manifest = read_manifest(config.data)
    model, initial_weights, tokenizer, config = build_model(config, manifest)

    # open the data, and read HellaSwag's examples
    sequences = config.batch_tokens // config.block_size
    train_loader = DataLoader(config.data, "train", sequences, config.block_size, config.seed,
                              world.rank, world.size, config.order, manifest)
    val_loader = DataLoader(config.data, "val", 1, config.block_size, manifest=manifest)
    examples = read_hellaswag(config, world)

    # print the plan
    device_name = ddp.device_name(world.device)
    if world.is_main:
        print(plan.describe(config, model, train_loader, val_loader, device_name, world.size))
    if config.dry_run:
        return None

    # initialize the weights on the device, then find the micro-batch that fits beside them
    place_model(model, initial_weights, config, world)
    micro_batch = choose_micro_batch(config, folder if first_step else None, model, world)
    config = dataclasses.replace(config, micro_batch=micro_batch)

    # create the optimizers, then load the checkpoint into the model and into them
    optimizers = optim.build_optimizers(model, config)
    scaler = create_scaler(config, world)
    data_checksums = checksum_data(config.data, manifest)
    is_evaluated = False
    if first_step:
        is_evaluated = load_checkpoint(folder, first_step, config, data_checksums, model,
                                       optimizers, scaler)
        if world.is_main:
            print(f"resuming {folder} from step {first_step:,}")

    # open the log
    log = None
    if world.is_main:
        log = runlog.Log(folder, run_description(config, manifest), first_step, is_evaluated,
                         config.track, device=device_name, processes=world.size)

    return TrainingRun(
        config=config, world=world, folder=folder, data_checksums=data_checksums,
        tokenizer=tokenizer, model=model, ddp_model=ddp.wrap(model, world), optimizers=optimizers,
        scaler=scaler, batches=train_loader.batches(first_step, config.max_steps, world.device),
        val_loader=val_loader, hellaswag_examples=examples,
        first_step=first_step, first_step_is_evaluated=is_evaluated, log=log)


# --------------------------------------------------------------------------------------------------
# Data and checkpoint

def plan_without_data(config: TrainConfig, world: ddp.World) -> None:
    """Prints the plan of a dry run that knows the size of its vocabulary.

    Any other run needs the data: raises UserError with the command that creates them.
    """
    if not config.dry_run or not config.vocab_size or config.init_from:
        raise UserError(f"No data found in {config.data}. Create it with: "
                        f"python {command_for_data(config)}")
    if world.is_main:
        with torch.device("meta"):
            model = GPT(model_sizes(config, config.vocab_size))
        device_name = ddp.device_name(world.device)
        print(plan.describe(config, model, None, None, device_name, world.size))


def command_for_data(config: TrainConfig) -> str:
    """The command line that creates the data, without "python"."""
    name, _, kind = config.data.name.rpartition("_")
    if config.data == TrainConfig.data:
        return "fineweb.py"
    if name in NAMED_TEXTS:
        text = "" if NAMED_TEXTS[name][0] else " --text FILE"  # without an address
        return f"prepare.py {name} --tokenizer {kind}{text}"
    bpe = kind.replace("-", ":") if kind.startswith("bpe-") else None
    tokenizer = config.init_from or bpe
    option = f" --tokenizer {tokenizer}" if tokenizer else ""
    return f"prepare.py FILE_OR_FOLDER{option} --out {config.data}"


def find_checkpoint(config: TrainConfig, folder: Path, world: ddp.World) -> int:
    """The step to resume from, the same on all ranks; 0 to start a new run.

    The main process decides. Raises UserError if a new run would start in a folder that already
    holds one.
    """
    step = 0
    if world.is_main:
        if config.resume == "auto":
            step = checkpoint.newest(folder) or 0  # no checkpoint is of step 0
        holds_run = checkpoint.saved_steps(folder) or checkpoint.model_steps(folder)
        if not step and holds_run:
            reason = ("all of its checkpoints are damaged" if config.resume == "auto" else
                      "--resume auto continues it")
            raise UserError(f"{folder} already holds a run ({reason}): choose another --name.")
    return int(ddp.sum_over_ranks(world, step)[0])


def read_hellaswag(config: TrainConfig, world: ddp.World) -> list[dict] | None:
    """HellaSwag's examples; None if the run does not score them or a rank cannot download them.

    A dry run does not download them.
    """
    if config.hellaswag == "none" or (config.dry_run and config.hellaswag == "auto"):
        return None
    if config.hellaswag != "auto":
        return hellaswag.read_examples(Path(config.hellaswag))
    try:
        examples = hellaswag.read_examples(hellaswag.download("--hellaswag"))
    except (UserError, OSError) as error:
        examples = None
        if world.is_main:
            print(f"training without HellaSwag: {error}", file=sys.stderr)
    return None if ddp.any_rank(world, not examples) else examples


# --------------------------------------------------------------------------------------------------
# The model

def build_model(config: TrainConfig, manifest: dict
                ) -> tuple[GPT, dict | None, Tokenizer, TrainConfig]:
    """Returns (model on the meta device, initial weights or None, tokenizer of the data, config).

    The returned configuration has the actual sizes, which --init-from and the tokenizer may set.
    """
    tokenizer = read_tokenizer(config.data, manifest)
    if config.init_from:
        source = load_source(config, tokenizer)
        sizes = dataclasses.replace(source.config, dropout=config.dropout)
        initial_weights = source.state_dict()
    else:
        sizes = model_sizes(config, config.vocab_size or tokenizer.vocab_size)
        initial_weights = None
    if sizes.vocab_size < tokenizer.vocab_size:
        raise UserError(f"A vocabulary of {sizes.vocab_size:,} is too small for the "
                        f"{tokenizer.vocab_size:,} ids of {config.data}: leave --vocab-size out.")
    block_size = min(config.block_size, sizes.block_size)  # --init-from may have a longer context
    if config.batch_tokens % block_size:
        raise UserError(f"--batch-tokens {config.batch_tokens:,} is not a multiple of the sequence "
                        f"length of {block_size} tokens.")
    with torch.device("meta"):
        model = GPT(sizes)
    config = dataclasses.replace(
        config, block_size=block_size, vocab_size=sizes.vocab_size, n_layer=sizes.n_layer,
        n_head=sizes.n_head, n_embd=sizes.n_embd)
    return model, initial_weights, tokenizer, config


def model_sizes(config: TrainConfig, vocab_size: int) -> GPTConfig:
    return GPTConfig(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd,
                     config.dropout)


def load_source(config: TrainConfig, tokenizer: Tokenizer) -> GPT:
    """Loads the model of --init-from. Raises UserError if the data or an option do not fit it."""
    name = config.init_from
    source, source_tokenizer, _ = checkpoint.load_model(name)
    if source_tokenizer.to_dict() != tokenizer.to_dict():
        raise UserError(f"{config.data} was prepared with another tokenizer than {name}'s: prepare "
                        f"it again with --tokenizer {name}.")

    # an option with the default value counts as left out
    for size in ("n_layer", "n_head", "n_embd"):
        given, default = getattr(config, size), getattr(TrainConfig, size)
        actual = getattr(source.config, size)
        if given not in (default, actual):
            raise UserError(f"{name} has {size} {actual}, not {given}: leave the option out.")
    if source.config.block_size < config.block_size != TrainConfig.block_size:
        raise UserError(f"{name} has a context of {source.config.block_size} tokens: use a smaller "
                        "--block-size.")
    return source


def place_model(model: GPT, initial_weights: dict | None, config: TrainConfig, world: ddp.World):
    """Moves the model from the meta device to this rank's device, ready to train.

    Compiles the model and shards it if the configuration says so, and initializes its weights. With
    --shard, this rank holds only its part of each parameter.
    """
    # set the kernels and the precision of matrix products
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at first use
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    if world.device.type == "cpu":
        ddp.keep_freed_memory()
    model.recompute = config.recompute_activations

    # compile and shard the model
    compiled = config.compile == "on" or (
        config.compile == "auto" and world.device.type == "cuda" and has_triton())
    dtype = compute_dtype(config, world.device)
    if config.shard:
        if torch.__version__ < (2, 9):
            raise UserError("--shard needs torch 2.9 or newer to save its checkpoints, and this is "
                            f"torch {torch.__version__}.")
        if world.size == 1:
            raise UserError("--shard divides a model among processes: start them with torchrun.")
        if dtype == torch.float16:
            raise UserError("--shard does not work with float16: add --dtype float32, or bfloat16 "
                            "if the device computes it.")
        if compiled:
            for block in model.transformer.h:
                block.compile()
        sharding.shard(model, world, dtype)
    elif compiled:
        model.compile()  # in place: parameters keep their names, and model.hidden stays eager

    # initialize the weights
    model.to_empty(device=world.device)
    torch.manual_seed(derive_seed(config.seed, "init"))
    if initial_weights:
        sharding.fill((p, initial_weights[name]) for name, p in model.named_parameters())
    else:
        sharding.fill(model.initial_weights())


def create_scaler(config: TrainConfig, world: ddp.World) -> torch.amp.GradScaler:
    """A scaler of the loss, active in float16 only."""
    uses_float16 = compute_dtype(config, world.device) == torch.float16
    return torch.amp.GradScaler(world.device.type, enabled=uses_float16)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The precision of the matrix products on the device."""
    if config.dtype == "auto":
        return ddp.auto_dtype(device)
    return torch.float32 if config.dtype == "tf32" else getattr(torch, config.dtype)


def autocast(config: TrainConfig, world: ddp.World):
    """The context for a forward pass: autocast to bfloat16 or float16 if the run uses it.

    A sharded model does not need it: it already gathers its weights in that precision.
    """
    dtype = compute_dtype(config, world.device)
    enabled = dtype != torch.float32 and not config.shard
    return torch.autocast(world.device.type, dtype, enabled=enabled)


# --------------------------------------------------------------------------------------------------
# The micro-batch

def choose_micro_batch(config: TrainConfig, saved_run: Path | None, model: GPT,
                       world: ddp.World) -> int:
    """The number of sequences that a process computes at a time.

    For `--micro-batch auto` this is the number that a resumed run already uses, or else this rank's
    share of the batch, halved until it fits on every rank.
    """
    if config.micro_batch != "auto":
        return config.micro_batch

    # look for a resumed run's number, which the main process sends to the other ranks
    saved = 0
    if saved_run and world.is_main:
        saved = runlog.read_config(saved_run).get("micro_batch", 0)
    if saved := int(ddp.sum_over_ranks(world, saved)[0]):
        return saved

    # halve this rank's share of the batch until it fits
    sequences = config.batch_tokens // config.block_size // world.size
    while sequences > 1 and ddp.any_rank(world, not fits_memory(sequences, config, model, world)):
        sequences = (sequences + 1) // 2
    return sequences


def fits_memory(sequences: int, config: TrainConfig, model: GPT, world: ddp.World) -> bool:
    """Whether a micro-batch of this many sequences fits in this rank's memory.

    On a GPU this tries one. On other devices it requires that the plan's estimate be below 80% of
    the memory; for sharded models too, as the other ranks would hang if one ran out of memory.
    """
    if world.device.type != "cuda" or config.shard:
        is_half = compute_dtype(config, world.device) != torch.float32
        sizes = plan.bytes_held(config, model, sequences, world.size, is_half, world.device.type)
        return sum(sizes.values()) < 0.8 * ddp.memory_bytes(world.device)
    reserved = idx = None
    try:
        # reserve the optimizer's memory and a margin of 5%, then run forward and backward
        size = plan.optimizer_bytes(config, model) + ddp.memory_bytes(world.device) // 20
        reserved = torch.empty(size, dtype=torch.uint8, device=world.device)
        idx = torch.zeros(sequences, config.block_size, dtype=torch.int64, device=world.device)
        with autocast(config, world):
            model(idx, idx)[1].backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del reserved, idx
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# Resuming

def load_checkpoint(folder: Path, step: int, config: TrainConfig, data_checksums: dict, model: GPT,
                    optimizers: list[torch.optim.Optimizer],
                    scaler: torch.amp.GradScaler) -> bool:
    """Loads the checkpoint of `step` into the model, the optimizers and the gradient scaler.

    Returns whether validation has already run at that step. Raises UserError if the configuration
    or the data differ from the checkpoint's.
    """
    # compare the configuration and the data with the checkpoint's
    saved = checkpoint.saved_config(folder, step)
    for name, value in run_fingerprint(config, data_checksums, step).items():
        # a checkpoint older than an option was trained with the option's default
        saved_value = saved.get(name, getattr(TrainConfig, name, value))
        if saved_value != value and name in data_checksums:
            raise UserError(f"{folder} was started with other data than {config.data} holds now: "
                            "restore the data, or choose another --name.")
        if saved_value != value:
            raise UserError(f"{folder} was started with {name} {saved_value}, and this command has "
                            f"{value}: repeat the original value, or choose another --name.")

    # load it
    optimizer_state, val_loss = checkpoint.load_state(folder, step, model)
    optim.load_named_state(model, optimizers, optimizer_state)
    if saved.get("grad_scaler"):  # else the checkpoint is not of a run in float16
        try:
            scaler.load_state_dict(saved["grad_scaler"])
        except (LookupError, TypeError, ValueError):
            state = checkpoint.state_path(folder, step)
            raise UserError(f"{state}/state.json is damaged: delete {state} to resume from an "
                            "older checkpoint.") from None
    return val_loss is not None
