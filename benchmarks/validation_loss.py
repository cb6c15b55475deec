"""The validation loss of a model, over the whole validation split.

    python prepare.py tiny_shakespeare --tokenizer bundled:shakespeare --out data/check
    python benchmarks/validation_loss.py bundled:shakespeare data/check
"""
import sys

sys.path.append(sys.path.pop(0).removesuffix("benchmarks"))  # this folder has a file named as one of the standard library

from pathlib import Path

import tyro

import ddp
from checkpoint import load_model
from dataloader import DataLoader
from errors import one_sentence
from presets import TrainConfig
from train import evaluate


def main(model: tyro.conf.Positional[str], data: tyro.conf.Positional[Path], device: str = "auto"):
    with ddp.join_world(device) as world:
        gpt, tokenizer, info = load_model(model, world.device)
        validation = DataLoader(data, "val", 1, gpt.config.block_size)
        config = TrainConfig(block_size=gpt.config.block_size, eval_tokens=len(validation.shards), micro_batch=16)
        loss = evaluate(gpt, validation, tokenizer.vocab_size, config, world)
    print(f"{info['name']}: {loss:.4f} nats a token over {validation.sequences:,} sequences of {gpt.config.block_size}")


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
