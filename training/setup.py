"""A run before its first step: its checkpoint, its model and weights on every process, what fits the device."""
import dataclasses
import os
import sys
from pathlib import Path

import torch

import checkpoint
import ddp
import hellaswag
import report
from common.errors import UserError
from common.seed import seed_of
from corpus.sources import NAMED_TEXTS
from model import GPT, GPTConfig
from shards import read_tokenizer
from tokenizer import Tokenizer
from training import optim, plan, sharding
from training.config import TrainConfig, recomputes, run_fingerprint


def find_checkpoint(config: TrainConfig, run: Path, world: ddp.World) -> int | None:
    """The step to go on from, None to start, as the main process finds it. Refuses to start in a folder that holds a run, damaged
    or not."""
    if not world.is_main:
        return None if (step := int(ddp.sum_over_ranks(world, 0)[0])) < 0 else step
    step = checkpoint.newest(run) if config.resume == "auto" else None
    if step is None and (checkpoint.saved_steps(run) or checkpoint.model_steps(run)):
        reason = "none of its checkpoints is whole" if config.resume == "auto" else "--resume auto goes on with it"
        raise UserError(f"{run} holds a run already ({reason}): give this one another name with --run.")
    ddp.sum_over_ranks(world, -1 if step is None else step)
    return step


def build(config: TrainConfig) -> tuple[GPT, dict | None, Tokenizer, TrainConfig]:
    """The model, on the meta device, the weights that it starts from if it is not to draw them, the data's tokenizer, and the
    configuration with what those decide filled in."""
    check_data(config)
    tokenizer = read_tokenizer(config.data)
    if config.init_from:
        source, own, _ = checkpoint.load_model(config.init_from)
        if own.to_dict() != tokenizer.to_dict():
            raise UserError(f"{config.data} was made with another tokenizer than that of {config.init_from}: prepare it "
                            f"again with --tokenizer {config.init_from}.")
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(config, name) not in (getattr(TrainConfig, name), getattr(source.config, name)):
                raise UserError(f"{config.init_from} has {name} {getattr(source.config, name)}: leave the option out.")
        if source.config.block_size < config.block_size != TrainConfig.block_size:
            raise UserError(f"{config.init_from} reads at most {source.config.block_size} tokens: lower --block-size.")
        sizes = dataclasses.replace(source.config, dropout=config.dropout)
    else:
        sizes = sizes_of(config, config.vocab_size or tokenizer.vocab_size)
    if sizes.vocab_size < tokenizer.vocab_size:
        raise UserError(f"A vocabulary of {sizes.vocab_size:,} does not hold the {tokenizer.vocab_size:,} ids of "
                        f"{config.data}: leave --vocab-size out.")
    with torch.device("meta"):
        model = GPT(sizes)
    block_size = min(config.block_size, sizes.block_size)  # a model can be trained on less than its context
    if config.batch_tokens % block_size:
        raise UserError(f"--batch-tokens {config.batch_tokens:,} does not divide into sequences of {block_size} tokens.")
    return model, source.state_dict() if config.init_from else None, tokenizer, dataclasses.replace(
        config, block_size=block_size, vocab_size=sizes.vocab_size, n_layer=sizes.n_layer, n_head=sizes.n_head,
        n_embd=sizes.n_embd)


def sizes_of(config: TrainConfig, vocab_size: int) -> GPTConfig:
    return GPTConfig(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd, config.dropout)


def check_data(config: TrainConfig):
    """Raises UserError, with the command that makes them, where there are no data."""
    data = config.data
    if not data.is_dir():
        name, _, kind = data.name.rpartition("_")
        if data == TrainConfig.data:
            command = "fineweb.py"
        elif name in NAMED_TEXTS:
            command = f"prepare.py {name} --tokenizer {kind}" + ("" if NAMED_TEXTS[name][0] else " --text FILE")
        else:
            own = config.init_from or (kind.replace("-", ":") if kind.startswith("bpe-") else None)
            command = "prepare.py FILE_OR_FOLDER" + (f" --tokenizer {own}" if own else "") + f" --out {data}"
        raise UserError(f"There is no data in {data}: make it with `python {command}`.")


def place(model: GPT, first_weights: dict | None, config: TrainConfig, world: ddp.World):
    """Takes a model from the meta device to this rank's, whole or this rank's part, compiled or not, with its first weights."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, before it is first used
        torch.use_deterministic_algorithms(True)
    if world.device.type == "cpu":
        ddp.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    compiled = config.compile == "on" or (config.compile == "auto" and world.device.type == "cuda")
    model.recompute = recomputes(config)
    if config.shard:
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
            raise UserError(f"--shard needs torch 2.9 or newer, to save its parts, and this is {torch.__version__}.")
        if world.size == 1:
            raise UserError("--shard divides a model among several processes: start it with torchrun.")
        for block in model.transformer.h if compiled else ():
            block.compile()
        sharding.shard(model, world, is_bfloat16(config, world))
    elif compiled:
        model.compile()  # in place: parameters keep their names, and model.hidden stays the plain one
    model.to_empty(device=world.device)
    torch.manual_seed(seed_of(config.seed, "init"))
    sharding.fill(((p, first_weights[name]) for name, p in model.named_parameters()) if first_weights else model.initial())


def is_bfloat16(config: TrainConfig, world: ddp.World) -> bool:
    return config.dtype == "bfloat16" or (config.dtype == "auto" and world.device.type == "cuda")


def autocast(config: TrainConfig, world: ddp.World):
    """Products in bfloat16 where the configuration has it so; a sharded model gathers its weights in that precision itself."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=is_bfloat16(config, world) and not config.shard)


def micro_batch(config: TrainConfig, run: Path | None, model: GPT, world: ddp.World) -> int:
    """The number that --micro-batch gives. For `auto` what the run that goes on has, else a rank's share of the batch, halved
    until every rank can hold it: on a GPU by trying, else by the plan's estimate against four fifths of the memory."""
    if config.micro_batch != "auto":
        return config.micro_batch
    found = report.read_config(run).get("micro_batch", 0) if run and world.is_main else 0
    sequences = int(ddp.sum_over_ranks(world, found)[0]) or config.batch_tokens // config.block_size // world.size
    while not run and sequences > 1 and ddp.any_rank(world, not fits(sequences, config, model, world)):
        sequences = (sequences + 1) // 2
    return sequences


def fits(sequences: int, config: TrainConfig, model: GPT, world: ddp.World) -> bool:
    """Whether this rank's device holds a step with so many sequences at a time."""
    config = dataclasses.replace(config, micro_batch=sequences)
    if world.device.type != "cuda" or config.shard:  # ranks that share each block would not run out of memory together
        held = plan.bytes_held(config, model, world.size, is_bfloat16(config, world))
        return sum(held.values()) < 0.8 * ddp.memory_bytes(world.device)
    moments = idx = None
    try:
        others = plan.optimizer_bytes(config, model) + ddp.memory_bytes(world.device) // 20  # and a margin
        moments = torch.empty(others, dtype=torch.uint8, device=world.device)
        idx = torch.zeros(sequences, config.block_size, dtype=torch.int64, device=world.device)
        with autocast(config, world):
            model.forward(idx, idx)[1].backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del moments, idx
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def resume(run: Path, step: int, config: TrainConfig, model: GPT, optimizers) -> bool:
    """Puts model and optimizers where the checkpoint of `step` left them; refuses another configuration. Whether that step was
    measured: one that a signal had saved was not."""
    saved = checkpoint.saved_config(run, step)
    for name, value in run_fingerprint(config, step).items():
        before = saved.get(name, getattr(TrainConfig, name, None))  # an option that came later had its default
        if before != value:
            raise UserError(f"{run} was started with {name} {before}, and this is {value}: "
                            "go on as it was started, or give this run another name with --run.")
    optimizer_state, val_loss = checkpoint.load_state(run, step, model)
    optim.load_named_state(model, optimizers, optimizer_state)
    return val_loss is not None


def hellaswag_examples(config: TrainConfig, world: ddp.World) -> list[dict] | None:
    """HellaSwag's examples, or None: also where `auto` cannot download them on every rank, which then is said."""
    if config.hellaswag == "none":
        return None
    try:
        examples = hellaswag.read_examples(
            Path(config.hellaswag) if config.hellaswag != "auto" else hellaswag.download("--hellaswag"))
    except (UserError, OSError) as error:
        if config.hellaswag != "auto":
            raise
        examples = None
        if world.is_main:
            print(f"The run goes without HellaSwag: {error}", file=sys.stderr)
    return examples if ddp.sum_over_ranks(world, examples is not None)[0] == world.size else None
