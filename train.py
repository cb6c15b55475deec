"""Trains a GPT: one loop from a character model on a laptop to GPT-2 124M on eight GPUs.

    python train.py shakespeare-char-cpu                     # after: python prepare.py tiny_shakespeare
    torchrun --standalone --nproc_per_node=8 train.py        # gpt2-124m, after: python fineweb.py
    torchrun --standalone --nproc_per_node=8 -- train.py --run second    # -- because torchrun has options like --run
    torchrun --standalone --nproc_per_node=8 train.py --shard            # for models that one device does not hold
    python train.py finetune --init-from bundled --data data/my_text_char

A preset is a set of defaults: any option overrides it. The run is the folder log/<run>/, and the same command goes
on where the run stopped.
"""
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import checkpoint
import ddp
import hellaswag
import optim
import plan
import report
import runs
from dataloader import DataLoader
from devices import find_device
from errors import UserError, one_sentence
from generate import Engine
from model import GPT, GPTConfig, cross_entropy
from presets import PRESETS, RECIPES, TrainConfig, check, described, identity, recomputes
from shards import read_tokenizer
from sources import NAMED_TEXTS
from tokenizer import Tokenizer

IN_A_ROW = 5  # updates with a gradient that is not finite, after which a run stops


def main(argv: list[str]):
    preset, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("gpt2-124m", argv)
    if preset not in PRESETS:
        raise UserError(f"There is no preset {preset!r}; there are: {', '.join(PRESETS)}.")
    default = dataclasses.replace(PRESETS[preset], run=preset)
    config = parse(preset, default, argv)
    if config.recipe != default.recipe:  # which has other defaults
        config = parse(preset, RECIPES[config.recipe](default), argv)
    check(config)
    if config.dry_run and not config.data.is_dir() and config.vocab_size and not config.init_from:
        with torch.device("meta"):
            model = GPT(sizes_of(config, config.vocab_size))
        print(plan.describe(config, model, None, None, config.gpu or ddp.pick_device(config.device).type, 1))
        return
    with ddp.join_world(config.device, config.wait_s) as world:
        train(config, world)


def parse(preset: str, default: TrainConfig, argv: list[str]) -> TrainConfig:
    return tyro.cli(TrainConfig, args=argv, default=default, prog=f"train.py {preset}",
                    description=f"{__doc__}\nPresets: {', '.join(PRESETS)}. The defaults below are {preset}'s.")


def train(config: TrainConfig, world: ddp.World):
    """The run that `config` describes, from its start or its newest checkpoint to its last step."""
    run = checkpoint.LOG / config.run
    with runs.locked(run) if world.is_main and not config.dry_run else contextlib.nullcontext(), runs.StopSignals() as signals:
        resume_step = find_checkpoint(config, run, world)
        model, first_weights, tokenizer, config = build(config)
        train_loader = DataLoader(config.data, "train", config.batch_tokens // config.block_size, config.block_size,
                                  config.seed, world.rank, world.size, config.order)
        val_loader = DataLoader(config.data, "val", 1, config.block_size)
        examples = None if config.dry_run and config.hellaswag == "auto" else hellaswag_examples(config, world)
        if world.is_main:
            print(plan.describe(config, model, train_loader, val_loader, ddp.device_name(world.device), world.size))
        if config.dry_run:
            return
        place(model, first_weights, config, world)
        config = dataclasses.replace(config, micro_batch=micro_batch(config, run if resume_step else None, model, world))
        optimizers = optim.build_optimizers(model, config.optimizer, config.weight_decay, (config.beta1, config.beta2))
        measured = resume_step is not None and resume(run, resume_step, config, model, optimizers)
        log = runs.Log(run, described(config), resume_step, measured, config.track, device=ddp.device_name(world.device),
                       processes=world.size) if world.is_main else None
        trained = Trained(config, world, run, log, model, ddp.wrap(model, world), tokenizer, optimizers)
        loop(trained, train_loader.batches(resume_step or 0, config.max_steps, world.device), val_loader, examples,
             resume_step or 0, measured, signals)
    if world.is_main:
        print(f"{run} is complete at step {config.max_steps}: python app.py --model {run}")


@dataclasses.dataclass
class Trained:
    """What a run works with from its first step to its last; the log is the main process's alone."""
    config: TrainConfig
    world: ddp.World
    run: Path
    log: runs.Log | None
    model: GPT
    ddp_model: torch.nn.Module
    tokenizer: Tokenizer
    optimizers: list[torch.optim.Optimizer]


def loop(t: Trained, batches, val_loader: DataLoader, examples, start: int, measured: bool, signals: runs.StopSignals):
    """Steps from `start` on; whether that step was `measured` before it was saved. At a signal all ranks stop at one step, which
    is saved, and exit as the signal would have made them."""
    meter, agreement = Meter(t), Agreement(t.world, signals)
    with tqdm(total=t.config.max_steps, initial=start, unit="step", disable=not t.world.is_main) as bar:
        for step in range(start, t.config.max_steps + 1):  # `step` updates have been taken
            if number := agreement.stop(step):
                if step > start:
                    save(t, step, None)
                ddp.sum_over_ranks(t.world, 0)  # a process that left earlier would bring the saving one down
                sys.exit(128 + number)
            if step > start or not measured:
                with torch.compiler.set_stance("force_eager"):  # batches of every shape, for which nothing is to be compiled
                    measure_and_save(t, val_loader, examples, step)
            if step == t.config.max_steps:
                return
            meter.start()
            x, y = next(batches)
            meter.add(step, *update(t, x, y, step), bar, wait=any(due(t.config, step + 1)))
            bar.update()


def measure_and_save(t: Trained, val_loader: DataLoader, examples, step: int):
    """What is due after `step` updates: validation, HellaSwag, a sample, a checkpoint."""
    config, (evaluation_due, sample_due, save_due) = t.config, due(t.config, step)
    if evaluation_due:
        val_loss = evaluate(t.model, val_loader, t.tokenizer.vocab_size, config, t.world)
        accuracy = score_hellaswag(t.model, t.tokenizer, examples, config, t.world) if examples else {}
        if t.log:
            t.log.metrics(step=step, val_loss=val_loss, **accuracy)
            if report.learns_fineweb_edu(described(config)):
                tqdm.write(report.compared(step * config.batch_tokens, val_loss))
    if sample_due and (t.log or config.shard):
        for text in (draw_together if config.shard else draw_samples)(t.model, t.tokenizer, config):
            if t.log:
                t.log.sample(step, config.sample_prompt, text)
    if save_due:
        save(t, step, val_loss)


def due(config: TrainConfig, step: int) -> tuple[bool, bool, bool]:
    """Whether validation, samples and a checkpoint are due after `step` updates; what is saved is measured before."""
    is_last = step == config.max_steps
    save_due = step > 0 and (step % config.save_every == 0 or is_last)
    return save_due or step % config.eval_every == 0, is_last or step % config.sample_every == 0, save_due


def save(t: Trained, step: int, val_loss: float | None):
    """Writes a checkpoint; val_loss is None where the step was not measured. A full disk costs this checkpoint, not the run."""
    if not t.log and not t.config.shard:
        return
    if t.config.shard:
        t.model.reshard()  # what validation had gathered
    try:
        checkpoint.save(t.run, step, t.model, optim.named_state(t.model, t.optimizers), t.tokenizer, identity(t.config, step),
                        val_loss, t.world)
    except checkpoint.NotSaved as error:
        if val_loss is None or step == t.config.max_steps:  # nothing comes after
            raise UserError(f"{error}: make room, and the same command goes on from the last one that was.") from None
        if t.log:
            runs.warn(f"{error}; the run goes on")


class Meter:
    """Reads loss, speed and skipped updates off the device every `log_every` steps, where alone a step waits for its numbers."""

    def __init__(self, t: Trained):
        self.t, self.seconds, self.tokens = t, 0.0, 0  # of training alone, since the last line of the log
        self.device = find_device(ddp.device_name(t.world.device))
        self.flops_per_token = t.model.flops_per_token(t.config.block_size)
        self.in_a_row, self.longest, self.skipped = (torch.zeros((), dtype=torch.int64, device=t.world.device) for _ in range(3))

    def start(self):
        self.began = time.perf_counter()

    def add(self, step: int, loss, grad_norm, lr: float, bar: tqdm, wait: bool):
        """Takes in what update `step`, counted from 0, returned. `wait` for the device where something else than training
        follows, which would else wait for it."""
        bad = ~grad_norm.isfinite()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        config, world = self.t.config, self.t.world
        self.tokens += config.batch_tokens
        if wait:
            loss.item()
        if (step + 1) % config.log_every and step + 1 < config.max_steps:
            self.seconds += time.perf_counter() - self.began
            return
        loss = ddp.sum_over_ranks(world, loss.item())[0] / world.size
        speed = self.tokens / (self.seconds + time.perf_counter() - self.began)
        mfu = {"mfu": speed * self.flops_per_token / (world.size * self.device.flops)} if self.device else {}
        skipped = {"skipped": self.skipped.item()} if self.skipped.item() else {}
        if self.t.log:
            shares = f"MFU {100 * mfu['mfu']:.0f}%" if mfu else "MFU n/a"
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s, {shares}", refresh=False)
            self.t.log.metrics(step=step + 1, train_loss=loss, grad_norm=grad_norm.item(), learning_rate=lr,
                               tokens_per_s=round(speed), **mfu, **skipped)
            if skipped:
                runs.warn(f"step {step + 1}: {skipped['skipped']} of the last updates had no finite gradient and were skipped")
        if self.longest >= IN_A_ROW:
            good = checkpoint.saved_steps(self.t.run)
            kept = f"the last checkpoint is of step {good[-1]}" if good else "no checkpoint was saved"
            raise UserError(f"The run has diverged: by step {step + 1}, {IN_A_ROW} gradients in a row were not finite; {kept}. "
                            "Start another with a lower --learning-rate.")
        self.seconds, self.tokens = 0.0, 0
        self.skipped.zero_()


class Agreement:
    """Whether all ranks stop, asked about every two seconds: a signal may reach one alone, and they must stop at one step."""

    def __init__(self, world: ddp.World, signals: runs.StopSignals):
        self.world, self.signals, self.asked, self.next = world, signals, None, 0

    def stop(self, step: int) -> int:
        """The signal after which every rank stops at this step, or 0."""
        if self.world.size == 1:
            return self.signals.received
        if step < self.next:
            return 0
        now, received = time.perf_counter(), self.signals.received
        last_step, last = self.asked or (step, now)
        seconds, terminated, interrupted = ddp.sum_over_ranks(
            self.world, (now - last) / self.world.size, received == signal.SIGTERM, received == signal.SIGINT)
        self.asked, self.next = (step, now), step + max(1, int(2 * (step - last_step) / seconds) if seconds else 1)
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0


# ----------------------------------------------------------------------------------------------------------------
# Setting up

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
        ddp.shard(model, world, is_bfloat16(config, world))
    elif compiled:
        model.compile()  # in place: parameters keep their names, and model.hidden stays the plain one
    model.to_empty(device=world.device)
    torch.manual_seed(ddp.seed_of(config.seed, "init"))
    ddp.fill(((p, first_weights[name]) for name, p in model.named_parameters()) if first_weights else model.initial())


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
            own = kind.replace("-", ":") if kind.startswith("bpe-") else "gpt2"
            command = f"prepare.py FILE_OR_FOLDER --tokenizer {config.init_from or own} --out {data}"
        raise UserError(f"There is no data in {data}: make it with `python {command}`.")


def resume(run: Path, step: int, config: TrainConfig, model: GPT, optimizers) -> bool:
    """Puts model and optimizers where the checkpoint of `step` left them; refuses another configuration. Whether that step was
    measured: one that a signal had saved was not."""
    for name, value in identity(config, step).items():
        if (saved := checkpoint.saved_config(run, step).get(name)) != value:
            raise UserError(f"{run} was started with {name} {saved}, and this is {value}: "
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


# ----------------------------------------------------------------------------------------------------------------
# A step, and what is measured between steps

def update(t: Trained, x, y, step: int):
    """One update from this rank's sequences x, y (B / world, T); none, alike on all ranks, where the gradient is not finite.

    Returns this rank's mean loss and the norm of the gradient before clipping, both still on the device, and the
    learning rate.
    """
    config, world, ddp_model, optimizers = t.config, t.world, t.ddp_model, t.optimizers
    ddp_model.train()
    torch.manual_seed(ddp.seed_of(config.seed, step, world.rank))  # dropout
    loss = torch.zeros((), device=world.device)
    parts = list(zip(x.split(config.micro_batch), y.split(config.micro_batch)))
    for i, (x_part, y_part) in enumerate(parts):
        # Gradients accumulate here and cross between ranks once, with the last micro-batch; sharded ones are never whole here.
        wait = world.size > 1 and not config.shard and i < len(parts) - 1
        accumulate = ddp_model.no_sync() if wait else contextlib.nullcontext()
        with accumulate, autocast(config, world):
            _, part_loss = ddp_model(x_part, y_part)
            part_loss = part_loss * (len(x_part) / len(x))
            part_loss.backward()
        loss += part_loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(ddp_model.parameters(), config.grad_clip or float("inf"))
    if config.shard:
        grad_norm = grad_norm.full_tensor()
    lr = optim.learning_rate(step, peak=config.learning_rate, schedule=config.schedule, min_ratio=config.min_lr_ratio,
                             warmup_steps=config.warmup_steps, max_steps=config.max_steps)
    optim.set_learning_rate(optimizers, lr)
    for optimizer in optimizers:
        optimizer.found_inf = (~grad_norm.isfinite()).float()  # the optimizer looks at it on the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, lr


def is_bfloat16(config: TrainConfig, world: ddp.World) -> bool:
    return config.dtype == "bfloat16" or (config.dtype == "auto" and world.device.type == "cuda")


def autocast(config: TrainConfig, world: ddp.World):
    """Products in bfloat16 where the configuration has it so; a sharded model gathers its weights in that precision itself."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=is_bfloat16(config, world) and not config.shard)


@torch.no_grad()
def evaluate(model: GPT, val_loader: DataLoader, vocab_size: int, config: TrainConfig, world: ddp.World) -> float:
    """Mean loss, nats per token, over the first `eval_tokens` of validation: the same sequences on any number of ranks.

    Probabilities are over the tokenizer's vocab_size ids, without a model's padding.
    """
    model.eval()
    count = min(val_loader.sequences, max(1, config.eval_tokens // config.block_size))
    total, tokens = 0.0, 0
    for first in range(world.rank * config.micro_batch, count + world.rank * config.micro_batch, world.size * config.micro_batch):
        sequences = range(first, min(first + config.micro_batch, count))
        if not sequences and not config.shard:
            break
        x, y = (part.to(world.device) for part in val_loader.read(sequences or range(1)))  # sharded, all run as many passes
        with autocast(config, world):
            hidden = model.hidden(x).flatten(0, 1)
            loss = cross_entropy(hidden, model.transformer.wte.weight[:vocab_size], y.flatten())
        total += loss.item() * len(sequences)
        tokens += len(sequences)
    total, tokens = ddp.sum_over_ranks(world, total, tokens)
    return total / tokens


def score_hellaswag(model: GPT, tokenizer: Tokenizer, examples: list[dict], config: TrainConfig, world: ddp.World) -> dict:
    """{"hellaswag": acc_norm over all examples, each scored by one rank}, by build-nanogpt's protocol."""
    with autocast(config, world):
        return {"hellaswag": hellaswag.evaluate(model, tokenizer, examples, "nanogpt", world=world)["nanogpt"]["acc_norm"]}


def draw_samples(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> list[str]:
    """Continuations of the sample prompt by the model as it is now."""
    model.eval()
    engine, prompt = Engine(model, tokenizer, dtype="float32"), config.sample_prompt
    return [prompt + text for text in engine.generate(engine.encode(prompt)[0], n=config.samples, max_new_tokens=200,
                                                      temperature=0.8, top_k=200, seed=config.seed)]


@torch.no_grad()
def draw_together(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> list[str]:
    """The same of a sharded model, plainly: every rank takes part in each of as many forward passes as there are tokens."""
    model.eval()
    prompt = tokenizer.encode(tokenizer.replace_unknown(config.sample_prompt)[0]) or [tokenizer.eot or 0]
    ids, generator = torch.tensor([prompt] * config.samples), torch.Generator().manual_seed(config.seed)
    for _ in range(200):
        hidden = model.hidden(ids[:, -config.block_size:].to(model.transformer.wte.weight.device))[:, -1]
        likeliest, choices = model.logits(hidden)[:, :tokenizer.vocab_size].float().cpu().topk(min(200, tokenizer.vocab_size))
        drawn = torch.multinomial((likeliest / 0.8).softmax(-1), 1, generator=generator)  # (samples, 1)
        ids = torch.cat([ids, choices.gather(1, drawn)], dim=1)
    texts = [row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row for row in ids[:, len(prompt):].tolist()]
    return [config.sample_prompt + tokenizer.decode(row) for row in texts]


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
