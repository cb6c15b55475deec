"""Trains a GPT: one loop, from a character model on a laptop to GPT-2 124M on eight GPUs.

    python train.py shakespeare-char-cpu                 # after: prepare.py tiny_shakespeare
    torchrun --standalone --nproc_per_node=8 train.py    # gpt2-124m, after: fineweb.py
    torchrun --standalone --nproc_per_node=8 train.py --name second
    torchrun --standalone --nproc_per_node=8 train.py --shard  # a model too large for one device
    python train.py finetune --init-from bundled --data data/my_text

A preset is a set of defaults, and any option overrides it. The run is the folder log/<name>/; run
the same command again to resume it.
"""
import contextlib
import os
import sys

from common.program import report_user_errors

# Let idle OpenMP threads sleep instead of spin, which slows a busy machine. Must precede torch
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro
from tqdm import tqdm

import checkpoint
import ddp
import hellaswag
from common.errors import UserError
from common.seed import derive_seed
from dataloader import DataLoader
from generate import Engine
from model import GPT
from training import optim, runlog, sharding
from training.config import TrainConfig, run_fingerprint, validate
from training.loss import cross_entropy
from training.meter import Meter
from training.presets import PRESETS, fast_recipe
from training.setup import TrainingRun, autocast, set_up
from training.signals import StopSignals

# --------------------------------------------------------------------------------------------------
# The command line

def main(argv: list[str]):
    # the first argument may name a preset
    if not argv or argv[0].startswith("-"):
        argv = ["gpt2-124m", *argv]
    preset, *argv = argv
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}. The presets are: {', '.join(PRESETS)}.")

    # options override the preset's defaults; a recipe changes those defaults first
    config = parse_options(PRESETS[preset], argv)
    if config.recipe == "fast":
        config = parse_options(fast_recipe(PRESETS[preset]), argv)
    validate(config)
    with ddp.join_world(config.device, config.wait_s) as world:
        train(config, world)


def parse_options(defaults: TrainConfig, argv: list[str]) -> TrainConfig:
    name = defaults.name
    description = f"{__doc__}\nPresets: {', '.join(PRESETS)}. The defaults below are {name}'s."
    return tyro.cli(TrainConfig, args=argv, default=defaults, prog=f"train.py {name}",
                    description=description)


# --------------------------------------------------------------------------------------------------
# Training

def train(config: TrainConfig, world: ddp.World):
    """Trains the run that `config` describes, from its newest checkpoint to its last step."""
    folder = checkpoint.LOG / config.name
    writes_files = world.is_main and not config.dry_run
    lock = runlog.locked(folder) if writes_files else contextlib.nullcontext()
    with lock:
        run = set_up(config, world)
        if run is None:  # a dry run
            return
        progress = tqdm(total=config.max_steps, initial=run.first_step, unit="step",
                        disable=not world.is_main)
        with progress, StopSignals(world) as signals:
            loop(run, signals, progress)
    if world.is_main:
        print(f"{folder} is complete at step {config.max_steps}: python app.py --model {folder}")


def loop(run: TrainingRun, signals: StopSignals, progress: tqdm):
    """Trains from run.first_step to max_steps. An iteration starts after `step` updates."""
    config = run.config
    meter = Meter(run)
    for step in range(run.first_step, config.max_steps + 1):
        try:
            signals.check_between_steps(step)

            # evaluate, sample and save once in a while, but not twice at the step of a resumed run
            if step > run.first_step or not run.first_step_is_evaluated:
                evaluate_sample_and_save(run, step)
            if step == config.max_steps:
                break

            # one training step
            meter.start()
            x, y = next(run.batches)  # (B / world, T) each
            loss, grad_norm, lr = train_step(run, x, y, step)
        except ddp.Stopped as stopped:
            save_and_exit(run, step, stopped.number)

        # log every log_every steps
        meter.stop(step, loss, grad_norm, lr, progress, pause_follows=any(due(config, step + 1)))
        progress.update()

        # until now a signal ended the process at once, as there was nothing to save
        if step == run.first_step:
            signals.start()


def train_step(run: TrainingRun, x, y, step: int):
    """Updates the model once, with this rank's inputs x and targets y, (B / world, T) each.

    Returns this rank's mean loss and the gradient's norm before clipping, both still on the device,
    and the learning rate. If the gradient is not finite, every rank skips the update. Raises
    ddp.Stopped after a signal, with the weights as they were.
    """
    config, world, model = run.config, run.world, run.ddp_model
    model.train()
    torch.manual_seed(derive_seed(config.seed, step, world.rank))  # for dropout

    # forward and backward, accumulating gradients over micro-batches
    loss = 0.0
    micro_batches = list(zip(x.split(config.micro_batch), y.split(config.micro_batch)))
    for i, (x_part, y_part) in enumerate(micro_batches):
        if world.size == 1 or world.device.type == "cpu":  # several GPUs would wait for each other
            ddp.check_signals(world)
        # let DDP average the gradients over the ranks once, after the last micro-batch
        last = i == len(micro_batches) - 1
        skip_sync = world.size > 1 and not config.shard and not last
        sync = model.no_sync() if skip_sync else contextlib.nullcontext()
        with sync, autocast(config, world):
            _, part_loss = model(x_part, y_part)
            part_loss = part_loss * (len(x_part) / len(x))  # a micro-batch's share of the mean
            run.scaler.scale(part_loss).backward()
        loss += part_loss.detach()

    # undo the scaling of float16, and clip the gradient
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
    if config.shard:
        grad_norm = grad_norm.full_tensor()

    # set the learning rate
    lr = optim.learning_rate(step, config)
    optim.set_learning_rate(run.optimizers, lr)

    # update the weights; the optimizers read found_inf on the device, so the CPU need not wait,
    # except on mps, where AdamW ignores found_inf in some versions of torch
    found_inf = (~grad_norm.isfinite()).float()  # 1 skips the update
    skip = world.device.type == "mps" and found_inf.item()
    for optimizer in run.optimizers:
        optimizer.found_inf = found_inf
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return loss, grad_norm, lr


# --------------------------------------------------------------------------------------------------
# Between steps: evaluate, sample, save

def due(config: TrainConfig, step: int) -> tuple[bool, bool, bool]:
    """Whether to evaluate, sample and save after `step` updates. Saving implies evaluating."""
    last_step = step == config.max_steps
    save_now = step > 0 and (step % config.save_every == 0 or last_step)
    evaluate_now = save_now or step % config.eval_every == 0
    sample_now = last_step or step % config.sample_every == 0
    return evaluate_now, sample_now, save_now


def evaluate_sample_and_save(run: TrainingRun, step: int):
    """Does what is due after `step` updates. Raises ddp.Stopped after a signal."""
    evaluate_now, sample_now, save_now = due(run.config, step)
    # eager, because torch.compile would compile anew for the shapes of these batches
    with torch.compiler.set_stance("force_eager"):
        if evaluate_now:
            val_loss = evaluate_and_log(run, step)
        if sample_now:
            sample_and_log(run, step)
        if save_now:
            save(run, step, val_loss)


def evaluate_and_log(run: TrainingRun, step: int) -> float:
    """Computes and logs the validation loss, and HellaSwag's accuracy if the run has examples."""
    config = run.config
    val_loss = evaluate(run.model, run.val_loader, run.tokenizer.vocab_size, config, run.world)
    accuracy = {}
    if run.hellaswag_examples:
        with autocast(config, run.world):
            scores = hellaswag.evaluate(run.model, run.tokenizer, run.hellaswag_examples, "nanogpt",
                                        world=run.world)
        accuracy["hellaswag"] = scores["nanogpt"]["acc_norm"]
    if run.log:
        run.log.metrics(step=step, val_loss=val_loss, **accuracy)
        if runlog.learns_fineweb_edu(run.log.config):
            import report  # noqa: PLC0415 (it takes a second, and few runs need it)
            tqdm.write(report.compare_to_published(step * config.batch_tokens, val_loss))
    return val_loss


@torch.no_grad()
def evaluate(model: GPT, val_loader: DataLoader, vocab_size: int, config: TrainConfig,
             world: ddp.World) -> float:
    """Mean loss in nats per token over the first eval_tokens of the validation split.

    The ranks divide the sequences among themselves. Probabilities are over the tokenizer's
    vocab_size ids, without the padding of the model's vocabulary.
    """
    model.eval()
    n_sequences = min(val_loader.sequences, max(1, config.eval_tokens // config.block_size))
    total_loss, n_scored = 0.0, 0
    for start in range(0, n_sequences, world.size * config.micro_batch):
        ddp.check_signals(world)

        # take this rank's sequences; at the end of the split there may be none
        first = start + world.rank * config.micro_batch
        sequences = range(first, min(first + config.micro_batch, n_sequences))
        if not sequences and not config.shard:
            continue

        # score them; with none, a rank of a sharded model runs the forward pass for the others
        x, y = val_loader.read(sequences or range(1))  # (micro_batch, T) each
        x, y = x.to(world.device), y.to(world.device)
        with autocast(config, world):
            hidden = model.hidden(x).flatten(0, 1)  # (micro_batch * T, C)
            head = model.transformer.wte.weight[:vocab_size]
            loss = cross_entropy(hidden, head, y.flatten())
        total_loss += loss.item() * len(sequences)
        n_scored += len(sequences)
    total_loss, n_scored = ddp.sum_over_ranks(world, total_loss, n_scored)
    return total_loss / n_scored


def sample_and_log(run: TrainingRun, step: int):
    """Samples and logs texts, on the main process or on all ranks of a sharded model."""
    if run.config.shard:
        texts = sharding.draw_together(run.model, run.tokenizer, run.config, run.world)
    elif run.log:
        texts = draw_samples(run)
    ddp.check_signals(run.world)  # the other ranks wait here for the samples
    if run.log:
        for text in texts:
            run.log.sample(step, run.config.sample_prompt, text)


def draw_samples(run: TrainingRun) -> list[str]:
    """Continuations of the sample prompt by the model as it is now. A signal cuts them off."""
    config = run.config
    run.model.eval()
    engine = Engine(run.model, run.tokenizer, dtype="float32")
    ids, _ = engine.encode(config.sample_prompt)
    request = engine.submit(ids, config.samples, max_new_tokens=sharding.SAMPLE_TOKENS,
                            temperature=0.8, top_k=200, seed=config.seed)
    texts = [config.sample_prompt] * config.samples
    for piece in engine.pieces(request):
        texts[piece.index] += piece.text
        if run.world.received_signal:
            break
    return texts


def save(run: TrainingRun, step: int, val_loss: float | None):
    """Writes a checkpoint. val_loss is None after a signal, which leaves no time to evaluate.

    If it cannot be written, for example on a full disk, training continues without it. Raises
    UserError if it was the last one.
    """
    config = run.config
    error = None
    if config.shard:
        run.model.reshard()  # free the weights that validation gathered
    if run.log or config.shard:
        try:
            fingerprint = run_fingerprint(config, run.data_checksums, step)
            checkpoint.save(run.folder, step, run.model,
                            optim.named_state(run.model, run.optimizers), run.tokenizer,
                            fingerprint | {"grad_scaler": run.scaler.state_dict()},
                            val_loss, run.world)
        except checkpoint.SaveError as save_error:
            error = save_error

    # if the last checkpoint failed, end every rank with this error, which only rank 0 prints
    is_last_checkpoint = val_loss is None or step == config.max_steps
    if is_last_checkpoint and ddp.any_rank(run.world, error):
        raise UserError(f"{error}. Free some disk space and run the same command again to resume "
                        "from the last checkpoint.")
    if error and run.log:
        runlog.warn(f"{error}; training continues")


def save_and_exit(run: TrainingRun, step: int, signal_number: int):
    """Saves the current step and exits with the signal's exit code."""
    save(run, step, None)
    if run.log:
        tqdm.write(f"saved step {step:,} and stopped; run the same command again to resume")
    ddp.sum_over_ranks(run.world, 0)  # wait: a rank that exits early would break the others
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
