"""Saving, resuming, and naming a model.

    model, tokenizer, info = load_model("bundled")          # or a run folder, a .pt, a Hugging Face folder, a Hub id

A run is a folder `log/<run>/`. A checkpoint in it is a pair: `model_00250.pt`, which anyone can load, and
`state_00250/`, which resuming needs besides, with the checksums of both. Both are written under temporary names before the
first is renamed, so that a pair is whole, or can be finished, or is ignored. Nothing is unpickled freely.
"""
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import UserError
from files import DISK_FULL, read_json, sha256, write_json
from formats import load_folder, load_pt, unpickle
from model import GPT
from tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "assets" / "bundled"
LOG = Path("log")
KEEP = 2  # newest checkpoints of a run that stay, besides the best model


# ----------------------------------------------------------------------------------------------------------------
# A run's checkpoints

class NotSaved(UserError):
    """A checkpoint could not be written, because the disk is full, say; those before it are as they were."""


def save(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer, config: dict, val_loss: float | None):
    """Writes the checkpoint of `step`, marks it when its validation loss, where it has one, is the run's best, and prunes older
    ones. One that is there and whole, because a signal had it saved before it was measured, stays as it is. Raises NotSaved
    where the disk refuses."""
    try:
        if not is_whole(run, step):
            write(run, step, model, optimizer_state, tokenizer, config, val_loss)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(run / "state.tmp", ignore_errors=True)
        unfinished(run, step).unlink(missing_ok=True)
        raise NotSaved(f"The checkpoint of step {step} could not be written to {run} ({error})") from None
    best_step, best_loss = read_best(run)
    if val_loss is not None and val_loss <= best_loss:
        best_step = step
        write_json(run / "best.json", {"step": step, "val_loss": val_loss})
    kept = [other for other in saved_steps(run) if other <= step][-KEEP:]  # the run went back behind any later one
    for other in set(saved_steps(run)) - set(kept):
        shutil.rmtree(state_path(run, other))
    for other in set(model_steps(run)) - {best_step, *kept}:
        model_path(run, other).unlink()


def write(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer, config: dict, val_loss: float | None):
    """Both halves under temporary names, then the state's name, then the model's: `newest` finishes what was cut between."""
    with open(unfinished(run, step), "wb") as file:
        torch.save({"format": 1, "model": model.state_dict(), "config": dataclasses.asdict(model.config),
                    "tokenizer": tokenizer.to_dict(), "step": step, "val_loss": val_loss}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary = run / "state.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: t.contiguous() for name, t in optimizer_state.items()}, temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {
        "format": 1, "step": step, "config": config,
        "sha256": {"model": sha256(unfinished(run, step)), "optimizer": sha256(temporary / "optimizer.safetensors")}})
    shutil.rmtree(state_path(run, step), ignore_errors=True)
    os.replace(temporary, state_path(run, step))
    os.replace(unfinished(run, step), model_path(run, step))


def newest(run: Path) -> int | None:
    """The step of the run's newest checkpoint whose two halves are whole, or None where there is none."""
    for step in reversed(saved_steps(run)):
        if is_whole(run, step):
            return step
        print(f"warning: the checkpoint of step {step} in {run} is damaged; looking for an older one", file=sys.stderr)
    return None


def is_whole(run: Path, step: int) -> bool:
    """Whether both halves of a checkpoint are as they were written; of one that was cut before its model had its name, the model
    is given it."""
    folder, temporary = state_path(run, step), unfinished(run, step)
    try:
        stated = read_json(folder / "state.json")["sha256"]
        if temporary.exists() and sha256(temporary) == stated["model"]:
            os.replace(temporary, model_path(run, step))
        return stated == {"model": sha256(model_path(run, step)), "optimizer": sha256(folder / "optimizer.safetensors")}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_state(run: Path, step: int) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """(model checkpoint, optimizer tensors by name, configuration) of a checkpoint that `newest` found whole."""
    folder = state_path(run, step)
    return (unpickle(model_path(run, step)), load_file(folder / "optimizer.safetensors"),
            read_json(folder / "state.json")["config"])


def model_path(run: Path, step: int) -> Path:
    return run / f"model_{step:05d}.pt"


def unfinished(run: Path, step: int) -> Path:
    return run / f"model_{step:05d}.pt.tmp"


def state_path(run: Path, step: int) -> Path:
    return run / f"state_{step:05d}"


def saved_steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, whole or not, the oldest first."""
    return sorted(int(path.name[6:]) for path in run.glob("state_*") if re.fullmatch(r"state_\d+", path.name))


def model_steps(run: Path) -> list[int]:
    """The steps of the run's models, the oldest first."""
    return sorted(int(path.stem[6:]) for path in run.glob("model_*.pt") if re.fullmatch(r"model_\d+", path.stem))


def read_best(run: Path) -> tuple[int | None, float]:
    """(step, validation loss) of the run's best model as best.json records it, or (None, infinity)."""
    try:
        best = read_json(run / "best.json")
        return int(best["step"]), float(best["val_loss"])
    except (ValueError, KeyError, TypeError):
        return None, float("inf")


# ----------------------------------------------------------------------------------------------------------------
# Naming a model

def load_model(name: str | Path | None = None, device="cpu") -> tuple[GPT, Tokenizer, dict]:
    """The model that `name` means, ready to evaluate: (model, tokenizer, info).

    `bundled[:name]`; else an existing path (a run folder, a `.pt`, a Hugging Face folder or its `.safetensors`); else
    an id on the Hugging Face Hub. None: the newest run under log/, else `bundled`. `info` holds `name`, `path`,
    `parameters`, and `step` and `val_loss` where they are known. Raises UserError where nothing is found or it is damaged.
    """
    path = find_model(name)
    model, tokenizer, info = load_pt(path) if path.suffix == ".pt" else load_folder(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"The tokenizer in {path} has {tokenizer.vocab_size:,} ids, and the model {model.config.vocab_size:,}.")
    model = model.to(device).eval().requires_grad_(False)
    return model, tokenizer, {"name": str(name or path), "path": str(path), "parameters": model.num_parameters(), **checked(info)}


def checked(info: dict) -> dict:
    """What a file tells of a model's training, without what cannot be meant."""
    def number(x) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1e15
    kinds = {"step": lambda x: number(x) and x == int(x), "val_loss": number, "train_config": lambda x: isinstance(x, dict)}
    return {key: info[key] for key, fits in kinds.items() if fits(info.get(key))}


def find_model(name: str | Path | None) -> Path:
    """The `.pt` file or Hugging Face folder that `name` means (see `load_model`)."""
    if name is None:
        name = next(iter(list_runs()), "bundled")
    name = str(name)
    if name == "bundled" or name.startswith("bundled:"):
        there = list_bundled()
        wanted = name.partition(":")[2] or next(iter(there), "")
        if wanted not in there:
            raise UserError(f"There is no bundled model {wanted!r}; there are: {', '.join(there) or 'none'}.")
        return BUNDLED / wanted
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        return path.parent
    if path.is_file():
        if path.suffix != ".pt":
            raise UserError(f"{path} is no model: models are .pt files, .safetensors files and folders.")
        return path
    if path.is_dir():
        return best_of(path) if model_steps(path) else path
    return download(name)


def list_bundled() -> list[str]:
    """Names of the bundled models, the default first."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def list_runs() -> list[str]:
    """The runs under log/ that have a model, the newest first."""
    newest_model = {run: max(os.path.getmtime(model_path(run, step)) for step in model_steps(run))
                    for run in LOG.glob("*") if model_steps(run)}
    return [str(run) for run in sorted(newest_model, key=newest_model.get, reverse=True)]


def best_of(run: Path) -> Path:
    """A run's best model where one is recorded, else its newest."""
    best_step, there = read_best(run)[0], model_steps(run)
    return model_path(run, best_step if best_step in there else there[-1])


def download(name: str) -> Path:
    """A model of the Hugging Face Hub, in huggingface_hub's cache: only the files that Hugging Face's layout names."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt",
            "added_tokens.json"]))
    except HFValidationError:
        reason = "and it cannot be the name of a model on the Hugging Face Hub"
    except RepositoryNotFoundError:
        reason = "and the Hugging Face Hub has no model of that name that you may see"
    except LocalEntryNotFoundError:
        reason = "and neither is it in the Hugging Face Hub's cache, nor can the Hub be reached"
    except Exception as error:  # whatever its HTTP library of the day raises
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"The disk of {huggingface_hub.constants.HF_HUB_CACHE} became full while {name} was downloaded: make "
                            "room, and the same command downloads what is missing.") from None
        reason = f"and its download broke off ({type(error).__name__}): the same command downloads what is missing"
    raise UserError(f"There is no file, folder or run {name!r}, {reason}.")


def describe(info: dict) -> str:
    """What is known of a model from `load_model`, in a line."""
    step = f", step {info['step']:,}" if info.get("step") else ""
    loss = f", validation loss {info['val_loss']:.4f}" if info.get("val_loss") else ""
    return f"{info['parameters']:,} parameters{step}{loss}"
