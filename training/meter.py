"""The numbers of the training steps: loss, speed, MFU and skipped updates."""
import time

import torch
from tqdm import tqdm

import checkpoint
import ddp
from common.devices import find_device
from common.errors import UserError
from training import runlog
from training.setup import TrainingRun

MAX_SKIPPED_IN_A_ROW = 5  # a run whose gradients are not finite this often in a row has diverged


class Meter:
    """Loss, speed and skipped updates, read from the device every log_every steps.

    Only those steps wait for the device; the others leave their numbers on it.
    """

    def __init__(self, run: TrainingRun):
        self.run = run
        self.device = find_device(ddp.device_name(run.world.device))
        self.flops_per_token = run.model.flops_per_token(run.config.block_size)
        self.seconds, self.tokens = 0.0, 0  # of training since the last line of the log
        device = run.world.device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # since the last line
        self.in_a_row = torch.zeros_like(self.skipped)
        self.longest_row = torch.zeros_like(self.skipped)

    def start(self):
        self.started = time.perf_counter()

    def stop(self, step: int, loss, grad_norm, lr: float, progress: tqdm, pause_follows: bool):
        """Takes the results of update `step`, the first being 0, and logs them if it is time.

        Waits for the device if an evaluation or a save follows, which would wait in its place.
        """
        config, world = self.run.config, self.run.world

        # count skipped updates on the device
        not_finite = ~grad_norm.isfinite()
        self.skipped += not_finite
        self.in_a_row = (self.in_a_row + 1) * not_finite
        self.longest_row = torch.maximum(self.longest_row, self.in_a_row)

        # count time and tokens
        self.tokens += config.batch_tokens
        if pause_follows:
            loss.item()
        last_step = step + 1 == config.max_steps
        log_now = (step + 1) % config.log_every == 0 or last_step
        if not log_now:
            self.seconds += time.perf_counter() - self.started
            return

        # average the loss over the ranks; this waits for the device
        loss = ddp.sum_over_ranks(world, loss.item())[0] / world.size
        self.seconds += time.perf_counter() - self.started
        tokens_per_s = self.tokens / self.seconds
        n_skipped = self.skipped.item()
        if self.run.log:
            self.write(step + 1, loss, grad_norm.item(), lr, tokens_per_s, n_skipped, progress)
        if self.longest_row >= MAX_SKIPPED_IN_A_ROW:
            raise self.diverged(step + 1)
        self.seconds, self.tokens = 0.0, 0
        self.skipped.zero_()

    def write(self, step: int, loss: float, grad_norm: float, lr: float, tokens_per_s: float,
              n_skipped: int, progress: tqdm):
        """One line in metrics.jsonl and on the progress bar."""
        values = {"train_loss": loss, "grad_norm": grad_norm, "learning_rate": lr,
                  "tokens_per_s": round(tokens_per_s)}
        mfu_text = "MFU n/a"
        if self.device:
            peak = self.run.world.size * self.device.flops
            values["mfu"] = tokens_per_s * self.flops_per_token / peak
            mfu_text = f"MFU {values['mfu']:.0%}"
        if n_skipped:
            values["skipped"] = n_skipped
            runlog.warn(f"step {step}: {n_skipped} of the last updates had a gradient that was not "
                        "finite and were skipped")
        self.run.log.metrics(step=step, **values)
        progress.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {mfu_text}",
                                 refresh=False)

    def diverged(self, step: int) -> UserError:
        saved = checkpoint.saved_steps(self.run.folder)
        kept = f"the last checkpoint is of step {saved[-1]}" if saved else "no checkpoint was saved"
        return UserError(f"The run has diverged: by step {step}, {MAX_SKIPPED_IN_A_ROW} gradients "
                         f"in a row were not finite; {kept}. Start a run with a lower "
                         "--learning-rate.")
