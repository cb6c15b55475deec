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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import ddp
from common.errors import UserError
from common.files import DISK_FULL, read_json, sha256, write_json
from model import GPT
from tokenizer import Tokenizer, load_tokenizer
from training import sharding
from weights.huggingface import load_folder
from weights.pt import load_pt, unpickle
from weights.state import DAMAGE

BUNDLED = Path(__file__).parent / "assets" / "bundled"
LOG = Path("log")
LARGEST_FILE = 10e9  # bytes of weights that a .pt may hold; those of a larger sharded model stay in the state
KEEP = 2  # newest checkpoints of a run that stay, besides the best model


# ----------------------------------------------------------------------------------------------------------------
# A run's checkpoints

class NotSaved(UserError):
    """A checkpoint could not be written, because the disk is full, say; those before it are as they were."""


def save(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer, config: dict, val_loss: float | None,
         world: ddp.World = ddp.SINGLE_PROCESS):
    """Writes the checkpoint of `step`, marks it when its validation loss, where it has one, is the run's best, and prunes older
    ones. One that is there and whole, because a signal had it saved before it was measured, stays as it is. The main process
    calls it, and of a sharded model all do. Raises NotSaved where the disk refuses."""
    try:
        there = world.is_main and is_whole(run, step)
        if not (ddp.any_rank(world, there) if ddp.is_sharded(model) else there):
            write(run, step, model, optimizer_state, tokenizer, config, val_loss, world)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(run / "state.tmp", ignore_errors=True)
        unfinished(run, step).unlink(missing_ok=True)
        raise NotSaved(f"The checkpoint of step {step} could not be written to {run} ({error})") from None
    if not world.is_main:
        return
    best_step, best_loss = read_best(run)
    if val_loss is not None and val_loss <= best_loss:
        best_step = step
        write_json(run / "best.json", {"step": step, "val_loss": val_loss})
    kept = [other for other in saved_steps(run) if other <= step][-KEEP:]  # the run went back behind any later one
    for other in set(saved_steps(run)) - set(kept):
        if other != best_step or not holds_weights(state_path(run, other)):
            shutil.rmtree(state_path(run, other))
    for other in set(model_steps(run)) - {best_step, *kept}:
        model_path(run, other).unlink()


def write(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer, config: dict, val_loss: float | None,
          world: ddp.World):
    """Both halves under temporary names, then the state's name, then the model's: `newest` finishes what was cut between. A
    sharded model's state is written by all ranks, with the weights in it where they are more than a file should hold."""
    temporary, about = run / "state.tmp", {"format": 1, "config": dataclasses.asdict(model.config),
                                           "tokenizer": tokenizer.to_dict(), "step": step, "val_loss": val_loss}
    weights = model.state_dict()
    sharded = ddp.is_sharded(model)
    in_a_file = not sharded or 4 * model.num_parameters() <= LARGEST_FILE
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    if sharded:
        ddp.any_rank(world, False)  # wait until it is gone
        sharding.write_shards(temporary, optimizer_state | ({} if in_a_file else sharding.named_weights(weights)))
        weights = {name: sharding.whole(w, world) for name, w in weights.items()} if in_a_file else {}
    else:
        temporary.mkdir()
        save_file({name: t.contiguous() for name, t in optimizer_state.items()}, temporary / "optimizer.safetensors")
    if not world.is_main:
        return
    if in_a_file:
        with open(unfinished(run, step), "wb") as file:
            torch.save({**about, "model": weights}, file)
            file.flush()
            os.fsync(file.fileno())
    else:
        write_json(temporary / "model.json", about)
    write_json(temporary / "state.json", {"format": 1, "step": step, "config": config,
                                          "sha256": sums(temporary, unfinished(run, step))})
    shutil.rmtree(state_path(run, step), ignore_errors=True)
    os.replace(temporary, state_path(run, step))
    if unfinished(run, step).exists():
        os.replace(unfinished(run, step), model_path(run, step))


def sums(folder: Path, model: Path) -> dict[str, str]:
    """sha256 of the two halves' files, by their names without an ending, and "model"."""
    files = {path.stem: path for path in folder.glob("*.safetensors")} | ({"model": model} if model.exists() else {})
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files.values())))


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
            os.replace(temporary, model_file(run, step))
        return stated == sums(folder, model_file(run, step))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def saved_config(run: Path, step: int) -> dict:
    """The configuration of a checkpoint that `newest` found whole."""
    return read_json(state_path(run, step) / "state.json")["config"]


def load_state(run: Path, step: int, model: GPT) -> tuple[dict[str, torch.Tensor], float | None]:
    """Gives the model the weights of a checkpoint that `newest` found whole; (the optimizer's tensors by name, the validation
    loss if it was measured). Sharded or not: the number of ranks may be another than wrote it."""
    folder, parameters = state_path(run, step), dict(model.named_parameters())

    def like(name: str, shape: torch.Size) -> torch.Tensor:
        p = parameters[name.rsplit("/", 1)[0]]
        return torch.empty_like(p.detach()) if p.shape == shape else torch.empty(shape)

    whole = folder / "optimizer.safetensors"
    state = load_file(whole) if whole.exists() and not ddp.is_sharded(model) else sharding.read_shards(folder, like)
    if holds_weights(folder):
        sharding.fill(((p, state.pop(f"{name}/weights")) for name, p in parameters.items()))
        return state, read_json(folder / "model.json")["val_loss"]
    saved = unpickle(model_path(run, step))
    sharding.fill((p, saved["model"][name]) for name, p in parameters.items())
    return state, saved["val_loss"]


def holds_weights(path: Path) -> bool:
    """Whether this is a state that holds the weights too, as they are too large for a file."""
    return (path / "model.json").exists()


def load_sharded(folder: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT, tokenizer, what is known of it) of a state that holds the weights."""
    try:
        saved = read_json(folder / "model.json")
        with torch.device("meta"):
            model = GPT(saved["config"])
        weights = sharding.named_weights(model.to_empty(device="cpu").state_dict())
        if sharding.read_shards(folder, lambda name, _: weights.get(name)).keys() != weights.keys():
            raise ValueError("there are weights missing")
        return model, load_tokenizer(saved["tokenizer"]), saved
    except (*DAMAGE, SafetensorError) as error:
        raise UserError(f"The checkpoint {folder} is damaged ({type(error).__name__}: {error}).") from None


def model_path(run: Path, step: int) -> Path:
    """The model's file, or the state that holds the weights."""
    return state_path(run, step) if holds_weights(state_path(run, step)) else model_file(run, step)


def model_file(run: Path, step: int) -> Path:
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
    files = {int(path.stem[6:]) for path in run.glob("model_*.pt") if re.fullmatch(r"model_\d+", path.stem)}
    return sorted(files | {step for step in saved_steps(run) if holds_weights(state_path(run, step))})


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
    load = load_pt if path.suffix == ".pt" else load_sharded if holds_weights(path) else load_folder
    model, tokenizer, info = load(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"The tokenizer in {path} has {tokenizer.vocab_size:,} ids, and the model {model.config.vocab_size:,}.")
    model = model.to(device).eval().requires_grad_(False)
    return model, tokenizer, {"name": str(name or path), "path": str(path), "parameters": model.num_parameters(), **plausible_info(info)}


def plausible_info(info: dict) -> dict:
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
