"""The validation loss of a model, over the whole validation split: sequences of its context, side by side.

    python prepare.py tiny_shakespeare --tokenizer bundled:shakespeare --out data/check
    python -m benchmarks.validation_loss bundled:shakespeare data/check
"""
import math
from pathlib import Path

import tyro

import ddp
from checkpoint import load_model
from common.errors import report_user_errors
from dataloader import DataLoader
from train import evaluate
from training.config import TrainConfig


def measure(model: str, data: Path, device: str = "auto") -> dict:
    """The model's name, its mean loss, the bits it takes a byte of text (the tokens between documents cost bits and have no
    bytes), and how many sequences and tokens those are of."""
    with ddp.join_world(device) as world:
        gpt, tokenizer, info = load_model(model, world.device)
        validation = DataLoader(data, "val", 1, gpt.config.block_size)
        config = TrainConfig(block_size=gpt.config.block_size, eval_tokens=len(validation.shards), micro_batch=16)
        loss = evaluate(gpt, validation, tokenizer.vocab_size, config, world)
    tokens = validation.sequences * gpt.config.block_size
    text = validation.shards.read(1, tokens + 1)
    size = len(tokenizer.decode_bytes(text[text != tokenizer.eot] if tokenizer.eot is not None else text))
    return {"name": info["name"], "loss": loss, "bits_per_byte": loss * tokens / size / math.log(2),
            "sequences": validation.sequences, "tokens": tokens}


def main(model: tyro.conf.Positional[str], data: tyro.conf.Positional[Path], device: str = "auto"):
    found = measure(model, data, device)
    print(f"{found['name']}: {found['loss']:.4f} nats a token over {found['sequences']:,} sequences of "
          f"{found['tokens'] // found['sequences']}, {found['bits_per_byte']:.4f} bits a byte")


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
