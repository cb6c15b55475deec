"""Saves and resumes runs, and loads models by name.

    model, tokenizer, info = load_model("bundled")  # or a run, a .pt, a model folder, a Hub id

A run is a folder `log/<run>/`. Each checkpoint in it is a pair:

    model_00250.pt    weights, configuration and tokenizer: all that is needed to use the model
    state_00250/      the rest of what resuming needs, and the checksums of both

Both are written under temporary names, then the state is renamed, then the model. So a crash leaves
a complete pair, one that `is_complete` completes, or files that are ignored. Unpickling is
restricted, so that loading a model cannot run code.
"""
import dataclasses
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import ddp
from common.errors import UserError
from common.files import DISK_FULL, read_json, sha256, write_json
from model import GPT, GPTConfig
from tokenizer import Tokenizer, load_tokenizer
from training import sharding
from weights.huggingface import load_folder
from weights.pt import load_pt, unpickle
from weights.state import DAMAGE

LOG = Path("log")
KEEP = 2  # newest checkpoints of a run to keep, besides the best model
MAX_PT_BYTES = 10e9  # a larger sharded model has its weights in the state, in parts

BUNDLED = Path(__file__).parent / "assets" / "bundled"
BUNDLED_ORDER = ("stories", "chat", "edu", "shakespeare", "pushkin")  # the default first


# --------------------------------------------------------------------------------------------------
# Saving

class SaveError(UserError):
    """A checkpoint could not be written, for example to a full disk. Earlier ones are intact."""


def save(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer,
         config: dict, val_loss: float | None, world: ddp.World = ddp.SINGLE_PROCESS):
    """Writes the checkpoint of `step` and deletes older ones.

    Keeps the newest `KEEP` checkpoints, and the model with the run's best validation loss. Does not
    replace a complete checkpoint of the same step, which a signal may have saved before validation
    ran. Call it on the main process, or on every rank if the model is sharded.

    Raises SaveError if the files cannot be written.
    """
    # write the pair
    try:
        exists = world.is_main and is_complete(run, step)
        if ddp.is_sharded(model):
            exists = ddp.any_rank(world, exists)  # tells the other ranks
        if not exists:
            write_checkpoint(run, step, model, optimizer_state, tokenizer, config, val_loss, world)
    except Exception as error:
        # a full disk must not stay full
        if world.is_main:
            remove_temporary_files(run)
        # torch.save hides the disk's error behind a RuntimeError about its own file
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise SaveError(f"The checkpoint of step {step} could not be written to {run} ({error})"
                        ) from None
    if not world.is_main:
        return

    # record the best model
    best_step, best_loss = read_best(run)
    if val_loss is not None and val_loss <= best_loss:
        best_step = step
        write_json(run / "best.json", {"step": step, "val_loss": val_loss})

    # delete old checkpoints, and those after `step`, which are left from before the run resumed
    steps = saved_steps(run)
    keep = set([saved for saved in steps if saved <= step][-KEEP:])
    for old in set(steps) - keep:
        if old != best_step or not holds_weights(state_path(run, old)):
            shutil.rmtree(state_path(run, old))
    for old in set(model_steps(run)) - keep - {best_step}:
        model_path(run, old).unlink()


def write_checkpoint(run: Path, step: int, model: GPT, optimizer_state: dict, tokenizer: Tokenizer,
                     config: dict, val_loss: float | None, world: ddp.World):
    """Writes state and model under temporary names, then renames the state, then the model.

    If the model is sharded, all ranks write its state. If its weights exceed MAX_PT_BYTES too, they
    are written into the state, and no `.pt` is written.
    """
    state = run / "state.tmp"
    description = {"format": 1, "config": dataclasses.asdict(model.config),
                   "tokenizer": tokenizer.to_dict(), "step": step, "val_loss": val_loss}
    weights = model.state_dict()
    is_sharded = ddp.is_sharded(model)
    fits_pt = not is_sharded or 4 * model.num_parameters() <= MAX_PT_BYTES

    if world.is_main:
        remove_temporary_files(run)  # of an interrupted attempt

    # write the optimizer's tensors, and the weights that do not fit a .pt
    if is_sharded:
        ddp.any_rank(world, False)  # wait until the main process has removed the folder
        tensors = optimizer_state if fits_pt else optimizer_state | sharding.named_weights(weights)
        sharding.write_shards(state, tensors)
        if fits_pt:
            weights = {name: sharding.whole(w, world) for name, w in weights.items()}
    else:
        state.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in optimizer_state.items()}
        save_file(tensors, state / "optimizer.safetensors")
    if not world.is_main:
        return

    # write the model
    if fits_pt:
        with open(temporary_pt(run, step), "wb") as file:
            torch.save({**description, "model": weights}, file)
            file.flush()
            os.fsync(file.fileno())
    else:
        write_json(state / "model.json", description)

    # write the checksums, then rename both
    checksums = compute_checksums(state, temporary_pt(run, step))
    write_json(state / "state.json",
               {"format": 1, "step": step, "config": config, "sha256": checksums})
    shutil.rmtree(state_path(run, step), ignore_errors=True)
    os.replace(state, state_path(run, step))
    if fits_pt:
        os.replace(temporary_pt(run, step), pt_path(run, step))


# --------------------------------------------------------------------------------------------------
# The pair of files, and its repair after a crash

def state_path(run: Path, step: int) -> Path:
    return run / f"state_{step:05d}"


def pt_path(run: Path, step: int) -> Path:
    return run / f"model_{step:05d}.pt"


def temporary_pt(run: Path, step: int) -> Path:
    """The name of the `.pt` until it and its state are complete."""
    return run / f"model_{step:05d}.pt.tmp"


def remove_temporary_files(run: Path):
    shutil.rmtree(run / "state.tmp", ignore_errors=True)
    for path in run.glob("model_*.pt.tmp"):
        path.unlink()


def model_path(run: Path, step: int) -> Path:
    """The path of a checkpoint's weights: its `.pt`, or its state if they are too large for one."""
    state = state_path(run, step)
    return state if holds_weights(state) else pt_path(run, step)


def holds_weights(state: Path) -> bool:
    """Whether the state holds the weights too, because they are too large for a `.pt`."""
    return (state / "model.json").exists()


def is_complete(run: Path, step: int) -> bool:
    """Whether both files of a checkpoint match their checksums.

    If the process died between the two renames, this renames the model to complete the pair.
    """
    state = state_path(run, step)
    temporary = temporary_pt(run, step)
    try:
        saved = read_json(state / "state.json")
        expected = saved["sha256"]
        if temporary.exists() and sha256(temporary) == expected["model"]:
            os.replace(temporary, pt_path(run, step))
        is_intact = expected == compute_checksums(state, pt_path(run, step))
        return is_intact and isinstance(saved["config"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def compute_checksums(state: Path, model: Path) -> dict[str, str]:
    """SHA-256 of the state's tensor files, by name without suffix, and of the model ("model")."""
    files = {path.stem: path for path in state.glob("*.safetensors")}
    if model.exists():
        files["model"] = model
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files.values())))


def saved_steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, complete or not, in ascending order."""
    numbers = [path.name.removeprefix("state_") for path in run.glob("state_*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def model_steps(run: Path) -> list[int]:
    """The steps at which the run has a model, in ascending order.

    The best model is kept when the state of its step is deleted, so it can be older than all
    `saved_steps`.
    """
    numbers = [path.stem.removeprefix("model_") for path in run.glob("model_*.pt")]
    steps = {int(number) for number in numbers if number.isdecimal()}
    steps.update(step for step in saved_steps(run) if holds_weights(state_path(run, step)))
    return sorted(steps)


def read_best(run: Path) -> tuple[int | None, float]:
    """(step, validation loss) of the run's best model, from best.json; else (None, infinity)."""
    try:
        best = read_json(run / "best.json")
        return int(best["step"]), float(best["val_loss"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None, float("inf")


# --------------------------------------------------------------------------------------------------
# Resuming

def newest(run: Path) -> int | None:
    """The step of the run's newest complete checkpoint, or None."""
    for step in reversed(saved_steps(run)):
        if is_complete(run, step):
            return step
        print(f"warning: the checkpoint of step {step} in {run} is damaged; trying an older one",
              file=sys.stderr)
    return None


def saved_config(run: Path, step: int) -> dict:
    """The run's configuration, from a checkpoint that `newest` returned."""
    return read_json(state_path(run, step) / "state.json")["config"]


def load_state(run: Path, step: int, model: GPT) -> tuple[dict[str, torch.Tensor], float | None]:
    """Loads the weights of a checkpoint that `newest` returned into the model.

    Returns the optimizer's tensors by name, and the validation loss, or None if validation had not
    run. The model may be sharded, and the number of ranks may differ from when it was saved.
    """
    state = state_path(run, step)
    parameters = dict(model.named_parameters())

    def allocate(name: str, shape: torch.Size) -> torch.Tensor:
        """An empty tensor, sharded like its parameter if it has the parameter's shape."""
        p = parameters[name.rsplit("/", 1)[0]]
        return torch.empty_like(p.detach()) if p.shape == shape else torch.empty(shape)

    # read the optimizer's tensors
    single_file = state / "optimizer.safetensors"
    if single_file.exists() and not ddp.is_sharded(model):
        # copy them out of the memory-mapped file, which Windows could not delete later
        tensors = {name: tensor.clone() for name, tensor in load_file(single_file).items()}
    else:
        tensors = sharding.read_shards(state, allocate)

    # load the weights, from the state or from the .pt
    if holds_weights(state):
        weights = {name: tensors.pop(f"{name}/weights") for name in parameters}
        val_loss = read_json(state / "model.json")["val_loss"]
    else:
        saved = unpickle(model_path(run, step))
        weights = saved["model"]
        val_loss = saved["val_loss"]
    sharding.fill((p, weights[name]) for name, p in parameters.items())
    return tensors, val_loss


# --------------------------------------------------------------------------------------------------
# Loading a model by name

def load_model(name: str | Path | None = None, device="cpu") -> tuple[GPT, Tokenizer, dict]:
    """Loads a model for evaluation and returns (model, tokenizer, info).

    `name` is `bundled` or `bundled:<name>`; else an existing path: a run folder, a `.pt` file, a
    Hugging Face folder or its `.safetensors` file; else an id on the Hugging Face Hub. With None,
    it is the newest run under log/, or `bundled` if there are no runs.

    `info` holds `name`, `path`, `parameters`, and if known `step`, `val_loss` and `train_config`.
    Raises UserError if the model is not found or is damaged.
    """
    path = find_model(name)
    if path.suffix == ".pt":
        model, tokenizer, info = load_pt(path)
    elif holds_weights(path):
        model, tokenizer, info = load_sharded(path)
    else:
        model, tokenizer, info = load_folder(path)
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"The tokenizer in {path} has {tokenizer.vocab_size:,} ids, but the model "
                        f"has only {vocab_size:,}: use the tokenizer it was trained with.")
    model = model.to(device).eval().requires_grad_(False)
    info = {"name": str(name or path), "path": str(path), "parameters": model.num_parameters(),
            **sanitize_info(info)}
    return model, tokenizer, info


def find_model(name: str | Path | None) -> Path:
    """The `.pt` file, model folder or state that `name` stands for (see `load_model`)."""
    if name is None:
        name = [*list_runs(), "bundled"][0]
    name = str(name)

    # a bundled model
    if name == "bundled" or name.startswith("bundled:"):
        bundled = list_bundled()
        model = name.partition(":")[2] or next(iter(bundled), "")
        if model not in bundled:
            raise UserError(f"Found no bundled model {model!r}: choose one of "
                            f"{', '.join(bundled) or '(none)'}.")
        return BUNDLED / model

    # a path, or else an id on the Hub
    path = Path(name)
    if path.is_dir():
        return best_model(path) if model_steps(path) else path
    if not path.is_file():
        return download(name)
    if path.suffix == ".safetensors":
        return path.parent
    if path.suffix != ".pt":
        raise UserError(f"{path} is not a model: give a .pt file, a .safetensors file or a folder.")
    return path


def list_bundled() -> list[str]:
    """Names of the bundled models, the default first."""
    names = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    return sorted(names, key=lambda name: (*BUNDLED_ORDER, name).index(name))  # others come last


def list_runs() -> list[str]:
    """The runs under log/ that have a model, the newest first."""
    saved_at = {}
    for run in LOG.glob("*"):
        models = [model_path(run, step) for step in model_steps(run)]
        if models:
            saved_at[run] = max(path.stat().st_mtime for path in models)
    return [str(run) for run in sorted(saved_at, key=saved_at.get, reverse=True)]


def best_model(run: Path) -> Path:
    """The run's best model if best.json names one, else its newest."""
    best_step, _ = read_best(run)
    steps = model_steps(run)
    return model_path(run, best_step if best_step in steps else steps[-1])


def load_sharded(state: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT, tokenizer, step and validation loss) from a state that holds the weights."""
    try:
        saved = read_json(state / "model.json")
        if not is_complete(state.parent, saved["step"]):
            raise ValueError("it does not match its checksums")
        config = GPTConfig(**saved["config"])
        # count the weights first: a damaged n_layer could ask for a billion layers
        stored_bytes = sum(path.stat().st_size for path in state.glob("*.safetensors"))
        if 4 * 12 * config.n_layer * config.n_embd**2 > stored_bytes:  # matrices in float32
            raise ValueError("its configuration names more weights than it holds")
        with torch.device("meta"):
            model = GPT(config)
        weights = sharding.named_weights(model.to_empty(device="cpu").state_dict())
        # fill the weights in place, and leave the optimizer's tensors out
        loaded = sharding.read_shards(state, lambda name, _: weights.get(name))
        if loaded.keys() != weights.keys():
            raise ValueError("some weights are missing")
        return model, load_tokenizer(saved["tokenizer"]), saved
    except DAMAGE as error:
        raise UserError(f"The checkpoint {state} is damaged ({type(error).__name__}: {error})."
                        ) from None


def download(name: str) -> Path:
    """Returns a model's folder in the Hugging Face Hub's cache, after downloading what is missing.

    Downloads only the files that `load_folder` reads.
    """
    import huggingface_hub as hub  # noqa: PLC0415 (only a download needs it)
    from huggingface_hub import errors  # noqa: PLC0415
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
            "tokenizer_config.json", "chat_template.jinja"]))
    except errors.HFValidationError:
        reason = "it is not a valid id of a model on the Hugging Face Hub"
    except errors.RepositoryNotFoundError:
        reason = "the Hugging Face Hub has no model of that name that you can access"
    except errors.LocalEntryNotFoundError:
        reason = ("the Hub cannot be reached to download it: check the name and the network "
                  "connection")
    except Exception as error:  # each version of huggingface_hub raises other HTTP errors
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"The disk of {hub.constants.HF_HUB_CACHE} became full while "
                            f"downloading {name}: free some space, then run the same command again "
                            "to download the rest.") from None
        reason = (f"its download from the Hugging Face Hub failed ({type(error).__name__}): "
                  "run the same command again to download the rest")
    raise UserError(f"Found no file, folder or run {name!r}, and {reason}.")


def sanitize_info(info: dict) -> dict:
    """Keeps `step`, `val_loss` and `train_config` if their values are valid; drops all others."""
    def is_number(x) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1e15

    is_valid = {"step": lambda x: is_number(x) and x == int(x), "val_loss": is_number,
                "train_config": lambda x: isinstance(x, dict)}
    return {key: info[key] for key, valid in is_valid.items() if valid(info.get(key))}


def describe(info: dict) -> str:
    """One line about a model, from the `info` that `load_model` returns."""
    step = f", step {info['step']:,}" if info.get("step") else ""
    loss = f", validation loss {info['val_loss']:.4f}" if info.get("val_loss") else ""
    return f"{info['parameters']:,} parameters{step}{loss}"
