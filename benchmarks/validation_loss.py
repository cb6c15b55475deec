"""A model's loss over the whole validation split, in non-overlapping sequences of its context.

    python prepare.py tiny_shakespeare --tokenizer bundled:shakespeare --out data/check
    python -m benchmarks.validation_loss bundled:shakespeare data/check
"""
import math
from pathlib import Path

from common.program import report_user_errors

import tyro

import ddp
from checkpoint import load_model
from dataloader import DataLoader
from train import evaluate
from training.config import TrainConfig


def measure(model_name: str, data: Path, device: str = "auto") -> dict:
    """The mean loss (nats per token), bits per byte of text, and the number of sequences and tokens
    scored.

    The tokens between documents count towards the bits, but not towards the bytes.
    """
    # the loss
    with ddp.join_world(device) as world:
        model, tokenizer, info = load_model(model_name, world.device)
        block_size = model.config.block_size
        loader = DataLoader(data, "val", 1, block_size)
        config = TrainConfig(block_size=block_size, eval_tokens=len(loader.shards), micro_batch=16)
        loss = evaluate(model, loader, tokenizer.vocab_size, config, world)

    # the size of the text in bytes
    tokens = loader.sequences * block_size
    ids = loader.shards.read(1, tokens + 1)  # each sequence predicts the token after it
    if tokenizer.eot is not None:
        ids = ids[ids != tokenizer.eot]
    text_bytes = len(tokenizer.decode_bytes(ids))
    return {
        "name": info["name"],
        "loss": loss,
        "bits_per_byte": loss * tokens / text_bytes / math.log(2),
        "sequences": loader.sequences,
        "tokens": tokens,
    }


def main(model: tyro.conf.Positional[str], data: tyro.conf.Positional[Path], device: str = "auto"):
    result = measure(model, data, device)
    print(f"{result['name']}: {result['loss']:.4f} nats per token over {result['sequences']:,} "
          f"sequences of {result['tokens'] // result['sequences']}, "
          f"{result['bits_per_byte']:.4f} bits per byte")


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
