"""Puts a model into the form that others open, with a card that says what it is, and onto the Hugging Face Hub.

    python publish.py export log/shakespeare-char-cpu my_model           # Hugging Face's layout, float16
    python publish.py export gpt2 gpt2-gguf --to gguf --dtype q8_0       # for llama.cpp
    python publish.py upload log/gpt2-124m me/my-gpt2                    # shows what it would send; --push sends it
"""
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Literal

import huggingface_hub as hub
import torch
import tyro
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

import report
from checkpoint import load_model, model_steps
from common.errors import UserError, report_user_errors
from model import GPT
from tokenizer import Tokenizer
from weights.gguf import save_gguf
from weights.huggingface import save_huggingface

app = tyro.extras.SubcommandApp()

HERE = {"corpus", "data", "run", "resume", "device", "compile", "dry_run"}  # of a recipe: what another machine has otherwise
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
    for name in "metrics.jsonl", "model.safetensors.index.json", "meta.pkl":
        if (folder / name).exists() or model_steps(folder):
            raise UserError(f"{folder} holds a run or another model's files, with which an export would not go together: choose "
                            "another folder.")
    if dtype == "q8_0" and to == "hf":
        raise UserError("Hugging Face's layout has no q8_0: choose another --dtype, or --to gguf.")
    gpt, tokenizer, info = load_model(model)
    if to == "hf" and Path(info["path"]).resolve() == folder.resolve():
        raise UserError(f"{folder} is the model itself: choose another folder.")
    if to == "gguf":
        path = folder / f"model-{dtype}.gguf"
        save_gguf(path, gpt, tokenizer, dtype, info["name"])
    else:
        path = folder / "model.safetensors"
        write_folder(folder, gpt, tokenizer, info, dtype, address=str(folder))
    print(f"{path}: {exported(gpt, tokenizer):,} parameters of {info['path']}, {path.stat().st_size / 1e6:.2f} MB of {dtype}")


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
    try:
        validate_repo_id(repository)
        _user, name = repository.split("/")
    except (HFValidationError, ValueError):
        raise UserError(f"A repository of the Hub is named user/name, not {repository!r}.") from None
    gpt, tokenizer, info = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), gpt, tokenizer, info, dtype, address=repository)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        for name, size in {**sizes, f"in all, for {constants.ENDPOINT}/{repository}": sum(sizes.values())}.items():
            print(f"{size:>15,} bytes  {name}")
        if not push:
            print("Nothing was sent: --push sends it.")
            return
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            with contextlib.suppress(EntryNotFoundError):
                if BY_PUBLISH not in hub.ModelCard.load(repository).content:
                    (Path(folder) / "README.md").unlink()
                    print(f"The card of {repository} was written by hand and stays as it is.")
            done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{name} in {dtype}")
        except Exception as error:  # whatever its HTTP library of the day raises
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"The Hugging Face Hub did not take {repository} ({type(error).__name__}: {reason}): `hf auth login` "
                            "makes you known to it, and the same command sends what is missing.") from None
    print(done)


def write_folder(folder: Path, gpt: GPT, tokenizer: Tokenizer, info: dict, dtype: str, address: str):
    """Hugging Face's layout in `folder`, with the model's card, which calls it `address`, and its run's plots; a card that
    somebody wrote by hand stays."""
    folder.mkdir(parents=True, exist_ok=True)
    run = run_of(info)
    if run:
        info = {**info, "train_config": report.read_config(run)}
    text = card(gpt, tokenizer, info, run, address)
    known = {key: info[key] for key in ("train_config", "step", "val_loss") if key in info}
    save_huggingface(folder, gpt, tokenizer, getattr(torch, dtype), **known)
    path = folder / "README.md"
    if path.exists() and BY_PUBLISH.encode() not in path.read_bytes():
        print(f"{path} was written by hand and stays as it is.")
        return
    path.write_text(text, encoding="utf-8")
    if run:
        report.save_plots(run, folder)


# ----------------------------------------------------------------------------------------------------------------
# The card

def run_of(info: dict) -> Path | None:
    """The folder of the run that made a model, where it is at hand."""
    path = Path(info["path"])
    return path.parent if path.suffix == ".pt" and "step" in info and (path.parent / "metrics.jsonl").is_file() else None


def card(gpt: GPT, tokenizer: Tokenizer, info: dict, run: Path | None, address: str) -> str:
    """The model card: what the model is and, as far as is known, how it was made and what came of it."""
    config = info.get("train_config", {})
    corpus = config["corpus"] if isinstance(config.get("corpus"), dict) else {}
    source = corpus["source"] if isinstance(corpus.get("source"), dict) else {}
    data = str(source.get("name") or Path(str(config.get("data", ""))).name)
    measured = [("cross_entropy_nats_per_token", data or "its text", info["val_loss"])] if "val_loss" in info else []
    figures = {"validation loss": f"{info['val_loss']:.4f} nats a token"} if measured and not run else {}
    if run:
        scored = report.hellaswag(run).query("curve == 'HellaSwag' and step == @info['step']")
        measured += [("acc_norm", "HellaSwag", float(accuracy)) for accuracy in scored["hellaswag"].tail(1)]
        figures = {"these weights": f"step {info['step']:,}", **report.summary(run)}
    name = Path(address).resolve().name
    return hub.ModelCard.from_template(
        hub.ModelCardData(
            license="mit" if run else None, library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"],
            datasets=[data.partition(":")[0]] if "revision" in source and data.count("/") == 1 else None, model_name=name,
            eval_results=[hub.EvalResult("text-generation", of.lower(), of, metric, round(value, 4))
                          for metric, of, value in measured] or None),
        template_path=CARD, mark=BY_PUBLISH, name=name, address=address, c=gpt.config, tokenizer=tokenizer,
        parameters=exported(gpt, tokenizer), figures=figures, data=data,
        plots=[f"{plot.__name__}.png" for plot in report.plots_of(run)] if run else [],
        source=source, corpus=corpus, recipe=json.dumps({k: v for k, v in config.items() if k not in HERE}, indent=1),
        samples=report.samples(run).query("step <= @info['step']").tail(1).to_dict("records") if run else []).content


def exported(gpt: GPT, tokenizer: Tokenizer) -> int:
    """Parameters without the embedding's padding rows."""
    return gpt.num_parameters() - (gpt.config.vocab_size - tokenizer.vocab_size) * gpt.config.n_embd


if __name__ == "__main__":
    with report_user_errors():
        app.cli(description=__doc__)
