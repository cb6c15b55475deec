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
import report
from common.devices import find_device
from common.errors import UserError, report_user_errors
from common.seed import seed_of
from dataloader import DataLoader
from generate import Engine
from model import GPT
from tokenizer import Tokenizer
from training import optim, plan, runlog, sharding
from training.config import TrainConfig, check, run_description, run_fingerprint
from training.loss import cross_entropy
from training.presets import PRESETS, RECIPES
from training.setup import autocast, build, find_checkpoint, hellaswag_examples, micro_batch, place, resume, sizes_of

MAX_SKIPPED_IN_A_ROW = 5  # updates with a gradient that is not finite, after which a run stops


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
    with runlog.locked(run) if world.is_main and not config.dry_run else contextlib.nullcontext(), runlog.StopSignals() as signals:
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
        optimizers = optim.build_optimizers(model, config.optimizer, config.weight_decay, (config.beta1, config.beta2),
                                            config.embedding_rate)
        measured = resume_step is not None and resume(run, resume_step, config, model, optimizers)
        if resume_step is not None and world.is_main:
            print(f"{run} goes on from step {resume_step:,}")
        log = runlog.Log(run, run_description(config), resume_step, measured, config.track, device=ddp.device_name(world.device),
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
    log: runlog.Log | None
    model: GPT
    ddp_model: torch.nn.Module
    tokenizer: Tokenizer
    optimizers: list[torch.optim.Optimizer]


def loop(t: Trained, batches, val_loader: DataLoader, examples, start: int, measured: bool, signals: runlog.StopSignals):
    """Steps from `start` on; whether that step was `measured` before it was saved. At a signal all ranks stop at one step, which
    is saved, and exit as the signal would have made them."""
    meter, agreement = Meter(t), Agreement(t.world, signals)
    with tqdm(total=t.config.max_steps, initial=start, unit="step", disable=not t.world.is_main) as bar:
        for step in range(start, t.config.max_steps + 1):  # `step` updates have been taken
            if number := agreement.stop(step):
                if step > start:
                    save(t, step, None)
                    if t.log:
                        tqdm.write(f"stopped after step {step:,}, which is saved: the same command goes on")
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
            if report.learns_fineweb_edu(run_description(config)):
                tqdm.write(report.compared(step * config.batch_tokens, val_loss))
    if sample_due and (t.log or config.shard):
        for text in (sharding.draw_together if config.shard else draw_samples)(t.model, t.tokenizer, config):
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
        checkpoint.save(t.run, step, t.model, optim.named_state(t.model, t.optimizers), t.tokenizer, run_fingerprint(t.config, step),
                        val_loss, t.world)
    except checkpoint.NotSaved as error:
        if val_loss is None or step == t.config.max_steps:  # nothing comes after
            raise UserError(f"{error}: make room, and the same command goes on from the last one that was.") from None
        if t.log:
            runlog.warn(f"{error}; the run goes on")


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
                runlog.warn(f"step {step + 1}: {skipped['skipped']} of the last updates had no finite gradient and were skipped")
        if self.longest >= MAX_SKIPPED_IN_A_ROW:
            good = checkpoint.saved_steps(self.t.run)
            kept = f"the last checkpoint is of step {good[-1]}" if good else "no checkpoint was saved"
            raise UserError(f"The run has diverged: by step {step + 1}, {MAX_SKIPPED_IN_A_ROW} gradients in a row were not finite; {kept}. "
                            "Start another with a lower --learning-rate.")
        self.seconds, self.tokens = 0.0, 0
        self.skipped.zero_()


class Agreement:
    """Whether all ranks stop, asked about every two seconds: a signal may reach one alone, and they must stop at one step."""

    def __init__(self, world: ddp.World, signals: runlog.StopSignals):
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
# A step, and what is measured between steps

def update(t: Trained, x, y, step: int):
    """One update from this rank's sequences x, y (B / world, T); none, alike on all ranks, where the gradient is not finite.

    Returns this rank's mean loss and the norm of the gradient before clipping, both still on the device, and the
    learning rate.
    """
    config, world, ddp_model, optimizers = t.config, t.world, t.ddp_model, t.optimizers
    ddp_model.train()
    torch.manual_seed(seed_of(config.seed, step, world.rank))  # dropout
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


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
