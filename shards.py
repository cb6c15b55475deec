"""Token shards on disk: written once, then read as one memory-mapped stream of N tokens a split.

    python shards.py info data/tiny_shakespeare_char         # what is in them, with a sample
    python shards.py verify data/tiny_shakespeare_char       # whether they are what was written

    data/tiny_shakespeare_char/
        tiny_shakespeare_val_000000.npy      1-D uint16 (uint32 where the vocabulary needs it)
        tiny_shakespeare_train_000001.npy    one running index over both splits
        manifest.json                        source, tokenizer, and documents, tokens, sha256 of each shard

Shards that others wrote are read in place: build-nanogpt's `.npy`, llm.c's and modded-nanogpt's `.bin` with its
1024-byte header, nanoGPT's raw `train.bin` and `val.bin`.
"""
import bisect
import json
import re
from pathlib import Path

import numpy as np
import tyro

from errors import UserError, one_sentence
from files import sha256, write_atomically, write_json
from tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024  # llm.c: 256 int32, of them magic, version, number of tokens


class ShardWriter:
    """Writes the shards of one corpus into `folder`, and the manifest last.

    An earlier output of the same name is replaced. Raises UserError for a folder that holds anything else.
    """

    def __init__(self, folder, name: str, tokenizer, source: dict):
        self.folder, self.name = Path(folder), name
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = re.compile(rf"({re.escape(name)}_(train|val)_\d{{6}}\.npy|manifest\.json)(\.tmp)?")
        foreign = [path.name for path in self.folder.iterdir() if not earlier.fullmatch(path.name)]
        if foreign:
            raise UserError(f"{folder} holds files that are not shards of {name} ({foreign[0]}): choose another folder "
                            "with --out.")
        for path in sorted(self.folder.iterdir()):  # the manifest first: without it a folder counts as unfinished
            path.unlink()
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.manifest = {"format": 1, "name": name, "source": source, "tokenizer": tokenizer.to_dict(), "shards": []}

    def write(self, split: str, tokens, documents: int):
        """Adds one shard of `split` ("train" or "val") with these token ids."""
        shards = self.manifest["shards"]
        path = self.folder / f"{self.name}_{split}_{len(shards):06d}.npy"
        write_atomically(path, lambda file: np.save(file, np.asarray(tokens, dtype=self.dtype)))
        shards.append({"file": path.name, "split": split, "documents": documents, "tokens": len(tokens),
                       "sha256": sha256(path)})

    def close(self):
        write_json(self.folder / MANIFEST, self.manifest)


class Shards:
    """The tokens of one split as one stream: `len()` of them, `read(start, stop)` from anywhere.

    Raises UserError where the folder has no such shards, or one of them is missing or cut off.
    """

    def __init__(self, folder, split: str):
        folder = Path(folder)
        stated = {folder / shard["file"]: shard["tokens"] for shard in read_manifest(folder).get("shards", ())
                  if shard["split"] == split}
        theirs = re.compile(rf".*_{split}_\d+\.(npy|bin)|{split}\.bin")  # without a manifest: shards of others
        files = list(stated) or sorted(path for path in folder.glob("*") if theirs.fullmatch(path.name))
        if not files:
            raise UserError(f"{folder} holds no {split} shards; `python prepare.py` makes them.")
        self.arrays = [open_shard(path) for path in files]
        for path, array in zip(files, self.arrays):
            if len(array) != stated.get(path, len(array)):
                raise UserError(f"{path} holds {len(array):,} tokens and the manifest says {stated[path]:,}: "
                                "prepare the data again.")
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop-1 of the stream, 0 <= start < stop <= len, across shard ends."""
        first = bisect.bisect_right(self.ends, start)
        begin = int(self.ends[first - 1]) if first else 0
        piece = self.arrays[first][start - begin:stop - begin]
        if begin + len(self.arrays[first]) >= stop:
            return piece
        return np.concatenate([piece, self.read(begin + len(self.arrays[first]), stop)])


def read_manifest(folder) -> dict:
    """The folder's manifest.json, or {} where others wrote the shards."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stated = [(shard["file"] + shard["split"] + shard["sha256"], shard["tokens"] + 0) for shard in manifest["shards"]]
        if manifest["format"] == 1 and isinstance(manifest["tokenizer"], dict) and stated:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not a manifest of format 1: prepare the data again.")


def read_tokenizer(folder) -> Tokenizer:
    """The tokenizer that the folder's shards were made with: GPT-2's where others wrote them without a manifest."""
    return load_tokenizer(read_manifest(folder).get("tokenizer", "gpt2"))


def open_shard(path: Path) -> np.ndarray:
    """One shard's tokens, memory-mapped: `.npy`, llm.c's `.bin`, or raw uint16 as nanoGPT writes them."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, dtype=np.int32, count=3)
            if len(header) == 3 and header[0] == LLMC_MAGIC:
                tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=LLMC_HEADER_BYTES, shape=(int(header[2]),))
            else:
                tokens = np.memmap(path, dtype=np.uint16, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and the manifest names it: prepare the data again.") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is cut off or no token shard ({error}): prepare the data again.") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not len(tokens):
        raise UserError(f"{path} is no token shard: it is {tokens.dtype} of shape {tokens.shape}.")
    return tokens


# ----------------------------------------------------------------------------------------------------------------
# The command line

app = tyro.extras.SubcommandApp()


@app.command
def verify(folder: tyro.conf.Positional[Path]):
    """Compares every shard with the checksum in the manifest, and names the first that differs."""
    stated = read_manifest(folder).get("shards", ())
    if not stated:
        raise UserError(f"{folder} has no manifest to compare its shards with.")
    for shard in stated:
        path = folder / shard["file"]
        if not path.exists() or sha256(path) != shard["sha256"]:
            raise UserError(f"{path} is {'damaged' if path.exists() else 'missing'}: prepare the data again.")
    print(f"{len(stated)} shards, {sum(shard['tokens'] for shard in stated):,} tokens: all as they were written")


@app.command
def info(folder: tyro.conf.Positional[Path]):
    """Prints documents, tokens, bytes a token and the first tokens of each split as text."""
    tokenizer, stated = read_tokenizer(folder), read_manifest(folder).get("shards", ())
    for split in "train", "val":
        shards = Shards(folder, split)
        sample = shards.read(0, min(len(shards), 1000)).tolist()
        documents = sum(shard["documents"] for shard in stated if shard["split"] == split)
        print(f"{split}: {documents or 'unknown'} documents, {len(shards):,} tokens in {len(shards.arrays)} shards, "
              f"{len(tokenizer.decode_bytes(sample)) / len(sample):.2f} bytes a token")
        print(tokenizer.decode(sample[:50]))


if __name__ == "__main__":
    with one_sentence():
        app.cli(description="What is in a folder of token shards, and whether it is whole.")
