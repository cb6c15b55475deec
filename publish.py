"""Puts a model into the form that others open, with a card that says what it is, and onto the Hugging Face Hub.

    python publish.py export log/shakespeare-char-cpu my_model           # Hugging Face's layout, float16
    python publish.py export gpt2 gpt2-gguf --to gguf --dtype q8_0       # for llama.cpp
    python publish.py upload log/gpt2-124m me/my-gpt2                    # shows what it would send; --push sends it
"""
import json
import re
import tempfile
from pathlib import Path
from typing import Literal

import huggingface_hub as hub
import torch
import tyro

import report
from checkpoint import load_model, model_steps
from errors import UserError, one_sentence
from files import read_json
from formats import save_gguf, save_huggingface
from model import GPT
from tokenizer import Tokenizer

app = tyro.extras.SubcommandApp()

CARD = Path(__file__).parent / "assets" / "card.md"
BY_PUBLISH = "<!-- Written by publish.py, which writes it again; a card without this line stays as it is. -->"


@app.command
def export(model: tyro.conf.Positional[str], folder: tyro.conf.Positional[Path], to: Literal["hf", "gguf"] = "hf",
           dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float16"):
    """Writes a model as a folder in Hugging Face's layout, which `transformers` and this repository open, or as llama.cpp's file.

    Args:
        model: A run folder, a .pt file, or any other name of a model.
        folder: The folder to write.
        to: hf, or gguf for llama.cpp, Ollama and their like.
        dtype: The precision of the stored matrices; q8_0, in blocks of 8 bits, is gguf's alone.
    """
    if model_steps(folder):
        raise UserError(f"{folder} holds a run, which an export would damage: choose another folder.")
    if dtype == "q8_0" and to == "hf":
        raise UserError("Hugging Face's layout has no q8_0: choose another --dtype, or --to gguf.")
    gpt, tokenizer, info = load_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "gguf":
        path = folder / f"model-{dtype}.gguf"
        save_gguf(path, gpt, tokenizer, dtype, info["name"])
    else:
        path = folder / "model.safetensors"
        write_folder(folder, gpt, tokenizer, info, dtype, address=str(folder))
    print(f"{path}: {info['parameters']:,} parameters of {info['path']}, {path.stat().st_size / 1e6:.2f} MB of {dtype}")


@app.command
def upload(model: tyro.conf.Positional[str], repository: tyro.conf.Positional[str],
           dtype: Literal["float32", "bfloat16", "float16"] = "float16", private: bool = False, push: bool = False):
    """Exports a model and sends it to the Hugging Face Hub, with the account that `hf auth login` knows.

    Args:
        model: A run folder, a .pt file, or any other name of a model.
        repository: Its name there, such as me/my-gpt2.
        dtype: The precision of the stored matrices.
        private: Make the repository, where it is a new one, visible to you alone.
        push: Send it; without this, what would be sent is only shown.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"A repository is named user/name, not {repository!r}.")
    gpt, tokenizer, info = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), gpt, tokenizer, info, dtype, address=repository)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        for name, size in {**sizes, f"in all, for {hub.constants.ENDPOINT}/{repository}": sum(sizes.values())}.items():
            print(f"{size:>15,} bytes  {name}")
        if not push:
            print("Nothing was sent: --push sends it.")
            return
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{info['name']} in {dtype}")
        except Exception as error:  # whatever its HTTP library of the day raises
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"The Hugging Face Hub did not take {repository} ({type(error).__name__}: {reason}): `hf auth login` "
                            "makes you known to it, and the same command sends what is missing.") from None
    print(done)


def write_folder(folder: Path, gpt: GPT, tokenizer: Tokenizer, info: dict, dtype: str, address: str):
    """Hugging Face's layout in `folder`, with the model's card, which calls it `address`."""
    train_config = read_json(run_of(info) / "config.json") if run_of(info) else info.get("train_config", {})
    known = {"train_config": train_config, "step": info.get("step"), "val_loss": info.get("val_loss")}
    save_huggingface(folder, gpt, tokenizer, getattr(torch, dtype), **{key: value for key, value in known.items() if value})
    write_card(folder, gpt, tokenizer, info, train_config, address)


# ----------------------------------------------------------------------------------------------------------------
# The card

def run_of(info: dict) -> Path | None:
    """The folder of the run that made a model, where it is at hand."""
    folder = Path(info["path"]).parent
    return folder if (folder / "metrics.jsonl").is_file() and (folder / "config.json").is_file() else None


def write_card(folder: Path, gpt: GPT, tokenizer: Tokenizer, info: dict, train_config: dict, address: str):
    """Writes README.md, and the run's plots beside it; a card that somebody wrote by hand stays."""
    path, run = folder / "README.md", run_of(info)
    if path.exists() and BY_PUBLISH not in path.read_text(encoding="utf-8"):
        print(f"{path} was written by hand and stays as it is.")
        return
    name, corpus = Path(address).name, train_config.pop("corpus", {})
    source = corpus.get("source", {})
    data = source.get("name") or str(train_config.get("data", "its text"))
    measured = [("cross_entropy_nats_per_token", data, info["val_loss"])] if info.get("val_loss") else []
    if run:
        scored = report.hellaswag(run).query("curve == 'HellaSwag'")
        measured += [("acc_norm", "HellaSwag", accuracy) for accuracy in scored.loc[scored["step"] == info["step"], "hellaswag"]]
    card = hub.ModelCard.from_template(
        hub.ModelCardData(
            license="mit", library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], model_name=name,
            datasets=[data.partition(":")[0]] if "revision" in source and data.count("/") == 1 else None,
            eval_results=[hub.EvalResult("text-generation", of.lower(), of, metric, round(value, 4))
                          for metric, of, value in measured] or None),
        template_path=CARD, mark=BY_PUBLISH, name=name, address=address, c=gpt.config, tokenizer=tokenizer,
        parameters=info["parameters"], recipe=json.dumps(train_config, indent=1), data=data, source=source, corpus=corpus,
        summary=report.summary(run) if run else {}, plots=report.save_plots(run, folder) if run else [],
        samples=report.samples(run).tail(1).to_dict("records") if run else [])
    card.save(path)


if __name__ == "__main__":
    with one_sentence():
        app.cli(description=__doc__)
