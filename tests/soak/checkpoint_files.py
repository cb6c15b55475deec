"""The checkpoints and published models that the fuzzer tries: CHECKPOINTS, a table at the end.

See tokenizer_files.py for how such a table works.
"""
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import torch
from conftest import tiny_gpt
from mutations import PICKLE_SNIPPETS, dump_json, mutate, mutate_document
from safetensors.torch import load_file, save_file
from small import CHARS, LETTERS, VALID, contents, damaged, replaced

import checkpoint
from common.files import write_json
from model import GPT, GPTConfig
from tokenizer import load_tokenizer
from training import optim, setup, sharding
from training.config import TrainConfig
from weights import state as weights_state
from weights.huggingface import save_huggingface

SIZES = {"block_size": 8, "vocab_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 8}
DESCRIPTION = {"format": 1, "config": dataclasses.asdict(GPTConfig(**SIZES)), "step": 1,
               "val_loss": 1.5, "tokenizer": CHARS.to_dict()}


def small_gpt() -> GPT:
    return tiny_gpt(**SIZES)


def share_models(patch):
    """Lets equal configurations share a model, which takes longer to build than to fill."""
    build = functools.lru_cache(100)(GPT)
    # without the weights of the input before
    patch.setattr(weights_state, "GPT", lambda config: build(config).to("meta"))
    # torch.load looks for a fake mode, which is for compilers, at every tensor
    patch.setattr(torch._guards, "detect_fake_mode", lambda *_: None)


def use_no_threads(patch):
    """Hashes files in this thread: others take longer to start than to hash a few bytes."""
    pool = types.SimpleNamespace(map=map)
    patch.setattr(checkpoint, "ThreadPoolExecutor", lambda: contextlib.nullcontext(pool))


def assert_same_weights(model: GPT, expected: dict):
    for name, w in model.state_dict().items():
        assert torch.equal(w, expected[name]), f"{name} was read without an error, but is wrong"


# --------------------------------------------------------------------------------------------------
# .pt

def pack(document) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


class Archive:
    """A `.pt`, and what torch.save wrote around its pickle."""

    def __init__(self, content: bytes):
        self.content = content
        others = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(others, "w") as new:
            for entry in old.infolist():
                if entry.filename.endswith("/data.pkl"):
                    self.name = entry.filename
                    self.pickle = old.read(entry)
                else:
                    new.writestr(entry.filename, old.read(entry))
        self.others = others.getvalue()

    def damage_pickle(self, source: random.Random) -> bytes:
        """The archive with a damaged pickle, and correct checksums."""
        buffer = io.BytesIO(self.others)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(self.name, mutate(self.pickle, source, PICKLE_SNIPPETS))
        return buffer.getvalue()


def in_one_storage(weights: dict) -> dict:
    """The same weights as views of one tensor, which torch.save writes and reads faster."""
    flat = torch.cat([w.flatten() for w in weights.values()])
    pieces = flat.split([w.numel() for w in weights.values()])
    return {name: piece.view(w.shape) for (name, w), piece in zip(weights.items(), pieces)}


def odd_tensors() -> list:
    return [torch.zeros(()), torch.zeros(0), torch.ones(8), torch.ones(5, 8), torch.ones(8).int(),
            torch.ones(8, dtype=torch.complex64), torch.ones(8).bool(), torch.ones(1).expand(24, 8),
            torch.ones(5, 8).to_sparse(), torch.full((8,), torch.nan), torch.ones(8).half(),
            torch.ones(8, requires_grad=True), torch.nn.Parameter(torch.ones(5, 8)),
            torch.empty(8, device="meta")]


def own_pt(patch):
    share_models(patch)
    weights = dict(small_gpt().state_dict())
    documents = [{**DESCRIPTION, "model": weights},
                 {**DESCRIPTION, "model": in_one_storage(weights)}]
    archives = [Archive(pack(document)) for document in documents]
    odd = odd_tensors()
    path = Path("model.pt")

    def attempt(source):
        i = source.random() < 0.75
        kind = source.random()
        if kind < 0.5:
            path.write_bytes(mutate(archives[i].content, source))
        elif kind < 0.75:
            path.write_bytes(archives[i].damage_pickle(source))
        else:
            path.write_bytes(pack(mutate_document(documents[i], source, odd)))
        model, _, _ = checkpoint.load_model("model.pt")
        if kind < 0.5:
            assert_same_weights(model, weights)
        return VALID
    return attempt


def foreign_pt(patch):
    """Checkpoints of nanoGPT and build-nanogpt."""
    share_models(patch)
    Path("meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(LETTERS))}))
    weights = in_one_storage(small_gpt().state_dict())
    program = types.ModuleType("train_gpt2")
    program.GPTConfig = dataclasses.make_dataclass("GPTConfig", SIZES)
    program.GPTConfig.__module__ = "train_gpt2"
    patch.setitem(sys.modules, "train_gpt2", program)
    documents = [
        {"model": {f"_orig_mod.{name}": w for name, w in weights.items()}, "config": dict(SIZES),
         "step": 3, "val_loss": 3.1},
        {"model": weights, "model_args": {**SIZES, "bias": True, "dropout": 0.2}, "iter_num": 5,
         "best_val_loss": torch.tensor(2.9), "config": {"dataset": "x"}, "optimizer": {}}]
    odd = odd_tensors()

    def save(document) -> bytes:
        """build-nanogpt pickles an object as its configuration."""
        if isinstance(document, dict) and "model_args" not in document:
            config = document.get("config")
            if isinstance(config, dict):
                instance = program.GPTConfig(**SIZES)
                instance.__dict__ = {str(name): value for name, value in config.items()}
                document = {**document, "config": instance}
        return pack(document)

    archives = [Archive(save(document)) for document in documents]

    def attempt(source):
        i = source.randrange(2)
        if source.random() < 0.4:
            content = archives[i].damage_pickle(source)
        else:
            content = save(mutate_document(documents[i], source, odd))
        Path("ckpt.pt").write_bytes(content)
        checkpoint.load_model("ckpt.pt")
        return VALID
    return attempt


class Call:
    """A pickle of this calls a function when it is read without restrictions."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def malicious_pickle(_patch):
    """A checkpoint or a meta.pkl that would write a file; half of them are damaged too."""
    trap = Path("ran").absolute()
    write = f"open({str(trap)!r}, 'w')"
    calls = [Call(os.system, f"touch {trap}"), Call(open, str(trap), "w"), Call(exec, write),
             Call(eval, write), Call(subprocess.check_output, ["touch", str(trap)]),
             Call(os.mkdir, str(trap)), Call(trap.touch)]
    saved = {**DESCRIPTION, "itos": {0: "a"}, "model": {"x": torch.ones(5, 8)}}
    documents = [document for call in calls for document in (
        call, [call], (1, call), {"model": {"x": call}}, {"itos": {0: call}}, {**saved, "x": call},
        {**saved, "model": {**saved["model"], "y": call}},
        *({**saved, key: call} for key in saved))]
    archives = [Archive(pack(document)) for document in documents]
    pickles = [pickle.dumps(document, protocol) for document in documents for protocol in range(6)]

    def attempt(source):
        is_damaged = source.random() < 0.5
        try:
            if source.random() < 0.5:
                archive = source.choice(archives)
                content = archive.damage_pickle(source) if is_damaged else archive.content
                Path("bad.pt").write_bytes(content)
                checkpoint.load_model("bad.pt")
            else:
                content = source.choice(pickles)
                if is_damaged:
                    content = mutate(content, source, PICKLE_SNIPPETS)
                Path("meta.pkl").write_bytes(content)
                load_tokenizer(Path())
            return VALID
        finally:
            assert not trap.exists(), "the call ran"
    return attempt


# --------------------------------------------------------------------------------------------------
# Runs

def run_folder(patch):
    """A run's state.json, optimizer.safetensors, model and best.json, read as a resume does."""
    run = Path("run")
    run.mkdir()
    config = TrainConfig(name="run", **SIZES)
    checksums = {"data": "d", "data_sample": "s"}

    def new_parts():
        model = small_gpt()
        optimizers = optim.build_optimizers(model, config)
        return model, optimizers, torch.amp.GradScaler("cpu")

    model, optimizers, scaler = new_parts()
    idx = torch.zeros(1, 8, dtype=torch.int64)
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    fingerprint = setup.run_fingerprint(config, checksums, 1)
    checkpoint.save(run, 1, model, optim.named_state(model, optimizers), CHARS,
                    fingerprint | {"grad_scaler": scaler.state_dict()}, 1.5)
    expected = {name: w.clone() for name, w in model.state_dict().items()}
    files = contents(run)
    parts = new_parts()

    # read the model anew only if it has changed
    use_no_threads(patch)
    unpickle = checkpoint.unpickle
    saved = unpickle(run / "model_00001.pt")
    patch.setattr(checkpoint, "unpickle", lambda path: (
        saved if path.read_bytes() == files[path] else unpickle(path)))

    def attempt(source):
        path = source.choice([*files, Path("run/state_00001/state.json")])
        with replaced(path, damaged(path, files[path], source)):
            if path.name == "best.json":
                assert checkpoint.find_model("run") == Path("run/model_00001.pt")
                return VALID
            step = checkpoint.newest(run)
            if step is None:
                return "an older checkpoint"
            setup.load_checkpoint(run, step, config, checksums, *parts)
            assert_same_weights(parts[0], expected)
            return VALID
    return attempt


def sharded_run(patch):
    """A state that holds the weights too, as training with --shard writes it for a large model."""
    use_no_threads(patch)
    run, state = Path("run"), Path("run/state_00001")
    expected = dict(small_gpt().state_dict())
    run.mkdir()
    sharding.write_shards(state, sharding.named_weights(expected))
    write_json(state / "model.json", DESCRIPTION)
    checksums = checkpoint.compute_checksums(state, Path("none"))
    write_json(state / "state.json", {"format": 1, "step": 1, "config": {}, "sha256": checksums})
    files = contents(run)

    def attempt(source):
        path = source.choice([*files, state / "model.json"])
        with replaced(path, damaged(path, files[path], source)):
            assert_same_weights(checkpoint.load_model("run")[0], expected)
            return VALID
    return attempt


# --------------------------------------------------------------------------------------------------
# Published models

def huggingface_folder(patch):
    """config.json and model.safetensors, with a checksum and as others write it."""
    share_models(patch)
    gpt = small_gpt()
    expected = dict(gpt.state_dict())
    folder = Path("hf")
    save_huggingface(folder, gpt, CHARS, torch.float32, step=3, val_loss=1.5)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    # the same without a checksum, and the index of a model in several files
    save_file(load_file(weights), "plain.safetensors")
    plain = Path("plain.safetensors").read_bytes()
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), weights.name)}
    jsons = {"config.json": (folder / "config.json").read_bytes(),
             "model.safetensors.index.json": json.dumps(index).encode()}
    dtypes = ("F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", [0, 0],
              [2**62, 4], [0, 2**40], {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})

    def damaged_weights(source) -> bytes:
        kind = source.random()
        if kind < 0.4:
            return content[:start] + mutate(content[start:], source)
        if kind < 0.65:
            return mutate(source.choice((content, plain)), source)
        changed = dump_json(mutate_document(header, source, dtypes), source)
        size = len(changed) if source.random() < 0.95 else source.choice((0, 2**40, 2**63))
        return struct.pack("<Q", size) + changed + content[start:]

    def attempt(source):
        if source.random() < 0.6:
            path, changed = weights, damaged_weights(source)
        else:
            name = source.choice(list(jsons))
            path, changed = folder / name, damaged(folder / name, jsons[name], source)
        with replaced(path, changed):
            model, _, _ = checkpoint.load_model("hf")
        if path == weights and changed.startswith(content[:start]):  # it has the checksum
            assert_same_weights(model, expected)
        return VALID
    return attempt


CHECKPOINTS = {
    "our .pt": own_pt,
    "a .pt of nanoGPT or build-nanogpt": foreign_pt,
    "a malicious pickle": malicious_pickle,
    "a run's checkpoint": run_folder,
    "a sharded run's checkpoint": sharded_run,
    "a Hugging Face folder": huggingface_folder,
}
