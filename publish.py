"""Exports a model for other programs, with a model card, and uploads it to the Hugging Face Hub.

    python publish.py export log/shakespeare-char-cpu my_model     # Hugging Face's layout, float16
    python publish.py export gpt2 gpt2-gguf --to gguf --dtype q8_0       # for llama.cpp
    python publish.py upload log/gpt2-124m me/my-gpt2     # shows what it sends; --push sends it
"""
import contextlib
import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from common.program import report_user_errors

import huggingface_hub as hub
import torch
import tyro
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import validate_repo_id

import report
from checkpoint import load_model, model_steps
from common.errors import UserError
from common.files import read_text
from model import GPT
from tokenizer import Tokenizer
from weights.huggingface import save_huggingface

app = tyro.extras.SubcommandApp()

CARD_TEMPLATE = Path(__file__).parent / "assets" / "card.md"

# a card that contains this is overwritten; any other was written by hand and is kept
MARK = "<!-- Written by publish.py"
MARK_LINE = f"{MARK}, which will overwrite this file: delete this line to keep your edits. -->"

# settings that depend on the machine, which a card's recipe leaves out
MACHINE_SETTINGS = {"corpus", "data", "run", "resume", "device", "compile", "dry_run"}


# --------------------------------------------------------------------------------------------------
# Commands

@app.command
def export(model: tyro.conf.Positional[str], folder: tyro.conf.Positional[Path],
           to: Literal["hf", "gguf"] = "hf",
           dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float16",
           chat_template: Path | None = None):
    """Writes a model as a Hugging Face folder, for `transformers`, or as llama.cpp's GGUF file.

    Args:
        model: A run folder, a .pt file, or another name of a model, as for generate.py.
        folder: The folder to write.
        to: hf, or gguf for llama.cpp, Ollama and others.
        dtype: The precision of the stored matrices; q8_0 (8 bits, in blocks) is for gguf only.
        chat_template: A Jinja file with the tokenizer's chat template; default: the model's own.
    """
    # check the options before anything is loaded
    other_files = ("metrics.jsonl", "model.safetensors.index.json", "meta.pkl")
    if model_steps(folder) or any((folder / name).exists() for name in other_files):
        raise UserError(f"{folder} holds a run or the files of another model: choose another "
                        "folder.")
    if dtype == "q8_0" and to == "hf":
        raise UserError("Hugging Face's layout has no q8_0: choose another --dtype, or --to gguf.")

    gpt, tokenizer, info = load_model(model)
    if to == "hf" and Path(info["path"]).resolve() == folder.resolve():
        raise UserError(f"{folder} is the model itself: choose another folder.")
    if chat_template:
        tokenizer = copy.copy(tokenizer)  # other models can share it
        tokenizer.chat_template = read_text(chat_template)

    if to == "gguf":
        from weights.gguf import save_gguf  # noqa: PLC0415 (only this needs gguf)

        path = folder / f"model-{dtype}.gguf"
        save_gguf(path, gpt, tokenizer, dtype, info["name"])
    else:
        path = folder / "model.safetensors"
        write_folder(folder, gpt, tokenizer, info, dtype, address=str(folder))
    print(f"{path}: {count_parameters(gpt, tokenizer):,} parameters from {info['path']}, "
          f"{path.stat().st_size / 1e6:.2f} MB in {dtype}")


@app.command
def upload(model: tyro.conf.Positional[str], repository: tyro.conf.Positional[str],
           dtype: Literal["float32", "bfloat16", "float16"] = "float16", private: bool = False,
           push: bool = False):
    """Exports a model and uploads it to the Hugging Face Hub, to the account of `hf auth login`.

    Args:
        model: A run folder, a .pt file, or another name of a model, as for generate.py.
        repository: The name of the repository on the Hub, such as me/my-gpt2.
        dtype: The precision of the stored matrices.
        private: Make a new repository private.
        push: Send the files; without it, they are only listed.
    """
    try:
        validate_repo_id(repository)
        _user, name = repository.split("/")
    except ValueError:
        raise UserError(f"A repository of the Hub is named user/name, not {repository!r}."
                        ) from None
    gpt, tokenizer, info = load_model(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder, gpt, tokenizer, info, dtype, address=repository)

        # list the files
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        for file, size in sizes.items():
            print(f"{size:>15,} bytes  {file}")
        print(f"{sum(sizes.values()):>15,} bytes  in total, for {constants.ENDPOINT}/{repository}")
        if not push:
            print("Nothing was sent: add --push to send it.")
            return

        # send them, except for the card if somebody has written another
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            with contextlib.suppress(EntryNotFoundError):
                if MARK not in hub.ModelCard.load(repository).content:
                    (folder / "README.md").unlink()
                    print(f"The card of {repository} was written by hand and is kept.")
            commit = hub.upload_folder(repo_id=repository, folder_path=folder,
                                       commit_message=f"{name} in {dtype}")
        except Exception as error:  # the HTTP library's errors depend on huggingface_hub's version
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"The upload to {repository} failed ({type(error).__name__}: "
                            f"{reason}): log in with `hf auth login` if needed, then run the same "
                            "command again to send the rest.") from None
    print(commit)


# --------------------------------------------------------------------------------------------------
# The exported folder

def write_folder(folder: Path, gpt: GPT, tokenizer: Tokenizer, info: dict, dtype: str,
                 address: str):
    """Writes the model in Hugging Face's layout, with its card and the plots of its run.

    `address` is the name under which the card loads the model. A card written by hand is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, info = find_run(info)

    # the weights
    training_info = {key: info[key] for key in ("train_config", "step", "val_loss") if key in info}
    save_huggingface(folder, gpt, tokenizer, getattr(torch, dtype), **training_info)

    # the plots and the card
    path = folder / "README.md"
    if path.exists() and MARK.encode() not in path.read_bytes():
        print(f"{path} was written by hand and is kept.")
    else:
        plots = report.save_plots(run, folder) if run else []
        card = model_card(gpt, tokenizer, info, run, address, plots)
        path.write_text(card, encoding="utf-8")


def count_parameters(gpt: GPT, tokenizer: Tokenizer) -> int:
    """The number of parameters without the embedding's padding rows, which are not exported."""
    padding_rows = gpt.config.vocab_size - tokenizer.vocab_size
    return gpt.num_parameters() - padding_rows * gpt.config.n_embd


# --------------------------------------------------------------------------------------------------
# The model card

def find_run(info: dict) -> tuple[Path | None, dict]:
    """(the folder of the run that trained a model, the model's info with the run's configuration).

    If the run is not on this machine, returns None and the info unchanged.
    """
    path = Path(info["path"])
    run = path.parent
    if path.suffix == ".pt" and "step" in info and (run / "metrics.jsonl").is_file():
        return run, {**info, "train_config": report.read_config(run)}
    return None, info


def model_card(gpt: GPT, tokenizer: Tokenizer, info: dict, run: Path | None, address: str,
               plots: Sequence[Path] = ()) -> str:
    """The card's text: what the model is and, if known, how it was trained and with what results.

    `info` and `run` are from `find_run`. The info's `train_config` may be missing or from another
    program. `plots` are image files beside the card.
    """
    config = info.get("train_config", {})
    corpus = as_dict(config.get("corpus"))
    source = as_dict(corpus.get("source"))
    data = str(source.get("name") or Path(str(config.get("data", ""))).name)

    # results: (metric, dataset, value) for the Hub's metadata, and a table for people
    results = []
    figures = {}
    samples = []
    if "val_loss" in info:
        results.append(("cross_entropy_nats_per_token", data or "its text", info["val_loss"]))
        figures["validation loss"] = f"{info['val_loss']:.4f} nats per token"
    if run:
        step = info["step"]
        figures = {"these weights": f"step {step:,}", **report.summary(run)}
        samples = report.samples(run).query("step <= @step").tail(1).to_dict("records")
        scores = report.hellaswag(run).query("curve == 'HellaSwag' and step == @step")
        for accuracy in scores["hellaswag"].tail(1):
            results.append(("acc_norm", "HellaSwag", float(accuracy)))

    # the Hub's metadata
    name = Path(address).resolve().name
    is_hub_dataset = "revision" in source and data.count("/") == 1
    eval_results = [
        hub.EvalResult("text-generation", dataset.lower(), dataset, metric, round(value, 4))
        for metric, dataset, value in results]
    metadata = hub.ModelCardData(
        license="mit" if run else None, library_name="transformers",
        pipeline_tag="text-generation", tags=["gpt2"], model_name=name,
        datasets=[data.partition(":")[0]] if is_hub_dataset else None,
        eval_results=eval_results or None)

    recipe = {key: value for key, value in config.items() if key not in MACHINE_SETTINGS}
    card = hub.ModelCard.from_template(
        metadata, template_path=CARD_TEMPLATE, mark=MARK_LINE, name=name, address=address,
        c=gpt.config, tokenizer=tokenizer, parameters=count_parameters(gpt, tokenizer),
        figures=figures, plots=[path.name for path in plots], samples=samples,
        data=data, source=source, corpus=corpus, recipe=json.dumps(recipe, indent=1))
    return card.content


def as_dict(value) -> dict:
    """The value if it is a dict, else {}: another program's configuration can hold anything."""
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    with report_user_errors():
        app.cli(description=__doc__)
