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
import contextlib
import json
import re
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from common.errors import UserError, report_user_errors
from common.files import sha256
from tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
SPLITS = ("val", "train")
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024  # llm.c: 256 int32, of them magic, version, number of tokens


class Shards:
    """The tokens of one split as one stream: `len()` of them, `read(start, stop)` from anywhere.

    Raises UserError where the folder has no such shards, or one of them is missing or cut off.
    """

    def __init__(self, folder, split: str):
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest and (any(folder.glob("progress*.json")) or any(folder.glob("manifest_p*.json"))):
            raise UserError(f"{folder} is not finished: the command that prepares it goes on where it stopped.")
        stated = {folder / shard["file"]: shard["tokens"] for shard in manifest.get("shards", ()) if shard["split"] == split}
        theirs = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")  # without a manifest: shards of others
        self.files = list(stated) if manifest else sorted(path for path in folder.glob("*") if theirs.fullmatch(path.name))
        if not self.files:
            raise UserError(f"{folder} holds no {split} shards; `python prepare.py` makes them." if folder.is_dir() else
                            f"There is no folder {folder}.")
        allow_open_files(len(self.files))
        self.arrays = [open_shard(path) for path in self.files]
        for path, array in zip(self.files, self.arrays):
            if len(array) != stated.get(path, len(array)):
                raise UserError(f"{path} holds {len(array):,} tokens and the manifest says {stated[path]:,}: "
                                "prepare the data again.")
        self.ends = np.cumsum([len(array) for array in self.arrays]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop-1 of the stream, 0 <= start < stop <= len, across shard ends."""
        pieces, shard = [], bisect.bisect_right(self.ends, start)
        while start < stop:
            begin = self.ends[shard] - len(self.arrays[shard])
            pieces.append(self.arrays[shard][start - begin:stop - begin])
            start, shard = self.ends[shard], shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def allow_open_files(number: int):
    """Raises this process's limit for so many memory-mapped files, where it is lower and the system lets it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 (not on Windows)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 2 * number + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * number + 256 if hard < 0 else min(hard, 2 * number + 256), hard))


def read_manifest(folder) -> dict:
    """The folder's manifest.json, or {} where others wrote the shards."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [(shard["split"] in SPLITS, Path(shard["file"]).name == shard["file"], shard["sha256"].isalnum(),
                   shard["tokens"] > 0, shard["documents"] >= 0) for shard in manifest["shards"]]
        plain = isinstance(manifest["tokenizer"], dict) and isinstance(manifest["source"], dict) and manifest["documents"] >= 0
        if manifest["format"] == 1 and plain and shards and all(map(all, shards)) and (
                len({shard["file"] for shard in manifest["shards"]}) == len(shards)):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is not a manifest of format 1: delete {folder} and prepare the data again.")


def read_tokenizer(folder) -> Tokenizer:
    """The tokenizer that the folder's shards were made with. Where others wrote them it is GPT-2's, or nanoGPT's meta.pkl."""
    theirs = Path(folder) if (Path(folder) / "meta.pkl").exists() else "gpt2"
    return load_tokenizer(read_manifest(folder).get("tokenizer", theirs))


def open_shard(path: Path) -> np.ndarray:
    """One shard's tokens, memory-mapped: `.npy`, llm.c's `.bin`, or raw uint16 as nanoGPT writes them."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, dtype=np.int32, count=3)
            if len(header) == 3 and header[0] == LLMC_MAGIC:
                if path.stat().st_size != LLMC_HEADER_BYTES + 2 * int(header[2]):
                    raise ValueError(f"its header announces {header[2]:,} tokens")
                tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=LLMC_HEADER_BYTES)
            else:
                tokens = np.memmap(path, dtype=np.uint16, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and the manifest names it: prepare the data again.") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is cut off or no token shard ({error}): prepare the data again.") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not len(tokens):
        raise UserError(f"{path} is no token shard, which is a row of uint16 or uint32.")
    return np.asarray(tokens)  # slices of a memmap proper are slow


def check_ids(tokens: np.ndarray, vocab_size: int, where):
    """Raises UserError for a token that the tokenizer has not."""
    if (largest := tokens.max()) >= vocab_size:
        raise UserError(f"{where} holds the id {largest:,}, and its tokenizer has {vocab_size:,}: it is damaged, or was made "
                        "with another tokenizer.")


# ----------------------------------------------------------------------------------------------------------------
# The command line

app = tyro.extras.SubcommandApp()


@app.command
def verify(folder: tyro.conf.Positional[Path]):
    """Compares every shard with the manifest, and names the first that differs."""
    manifest, tokenizer = read_manifest(folder), read_tokenizer(folder)
    stated = {folder / shard["file"]: shard for shard in manifest.get("shards", ())}
    splits = [Shards(folder, split) for split in SPLITS]
    arrays = [pair for shards in splits for pair in zip(shards.files, shards.arrays)]
    for path, tokens in tqdm(arrays, unit="shard", leave=False):
        if path in stated and sha256(path) != stated[path]["sha256"]:
            raise UserError(f"{path} is damaged, its checksum is not the manifest's: prepare the data again.")
        check_ids(tokens, tokenizer.vocab_size, path)
        documents = stated.get(path, {}).get("documents")
        if documents is not None and tokenizer.eot is not None and documents != np.count_nonzero(tokens == tokenizer.eot):
            raise UserError(f"{path} does not hold the {documents:,} documents that the manifest says: prepare the data again.")
    for key in ("tokens", "documents") if manifest else ():
        if manifest[key] != sum(shard[key] for shard in stated.values()):
            raise UserError(f"{folder / MANIFEST} names {manifest[key]:,} {key}, and its shards add up to others.")
    unnamed = set(folder.glob("*.npy")) - set(stated) if manifest else set()
    if unnamed:
        raise UserError(f"{min(unnamed)} is not in the manifest: it does not belong to this corpus.")
    print(f"{len(arrays)} shards, {sum(map(len, splits)):,} tokens: "
          + ("all as they were written" if manifest else "all can be read; they came without checksums"))


@app.command
def info(folder: tyro.conf.Positional[Path]):
    """Prints documents, tokens, bytes a token, and the beginning of a document of each split."""
    tokenizer, manifest = read_tokenizer(folder), read_manifest(folder)
    if manifest:
        print(f"{manifest['source'].get('name', 'unknown source')}, by {tokenizer.kind} with {tokenizer.vocab_size:,} ids")
    for split in "train", "val":
        shards = Shards(folder, split)
        documents = sum(shard["documents"] for shard in manifest.get("shards", ()) if shard["split"] == split)
        sample = shards.read(0, min(len(shards), 100_000))
        begin = int(np.argmax(sample == tokenizer.eot)) if tokenizer.eot is not None else 0
        print(f"{split}: {f'{documents:,}' if manifest else 'unknown'} documents, {len(shards):,} tokens in "
              f"{len(shards.files)} shards, {len(tokenizer.decode_bytes(sample.tolist())) / len(sample):.2f} bytes a token")
        print(tokenizer.decode(sample[begin:begin + 50].tolist()))


if __name__ == "__main__":
    with report_user_errors():
        app.cli(description="What is in a folder of token shards, and whether it is whole.")
