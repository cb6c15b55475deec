"""Puts a model into the form that others open.

    python publish.py export log/shakespeare-char-cpu my_model   # Hugging Face's layout, float16
"""
from pathlib import Path
from typing import Literal

import torch
import tyro

from checkpoint import load_model, model_steps
from errors import UserError, one_sentence
from formats import save_huggingface

app = tyro.extras.SubcommandApp()


@app.command
def export(model: tyro.conf.Positional[str], folder: tyro.conf.Positional[Path],
           dtype: Literal["float32", "bfloat16", "float16"] = "float16"):
    """Writes a model as a folder in Hugging Face's layout, which `transformers` and this repository open.

    Args:
        model: A run folder, a .pt file, or any other name of a model.
        folder: The folder to write.
        dtype: The precision of the stored weights.
    """
    if model_steps(folder):
        raise UserError(f"{folder} holds a run, which an export would damage: choose another folder.")
    gpt, tokenizer, info = load_model(model)
    save_huggingface(folder, gpt, tokenizer, getattr(torch, dtype))
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {info['parameters']:,} parameters of {info['path']}, {size / 1e6:.2f} MB of {dtype}")


if __name__ == "__main__":
    with one_sentence():
        app.cli(description=__doc__)
