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
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

from errors import UserError, one_sentence
from files import read_json, sha256, write_atomically, write_json
from tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
SPLITS = ("val", "train")
HEADER_BYTES = 128  # of a .npy file with one dimension
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024  # llm.c: 256 int32, of them magic, version, number of tokens


class ShardWriter:
    """Writes a corpus, or one of several parts of it, into shards of `shard_tokens`; the first of all is validation.

        with ShardWriter(folder, name, tokenizer, source) as writer:
            for … in everything after writer.cursor:
                writer.append(tokens, starts)
                writer.commit(cursor)  # what is killed later goes on from here
            writer.finish()

    What is on the disk beyond the last commit is written again. Raises UserError for a folder that another process writes
    to, or that holds anything but the same preparation.
    """

    def __init__(self, folder, name: str, tokenizer: Tokenizer, source: dict, shard_tokens: int = 10**8,
                 part: int = 0, parts: int = 1):
        self.folder, self.part, self.shard_tokens, self.eot = Path(folder), part, shard_tokens, tokenizer.eot
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.identity = {"format": 1, "name": name, "source": source, "tokenizer": tokenizer.to_dict(),
                         "shard_tokens": shard_tokens, "parts": parts}
        suffix = part_suffix(part) if parts > 1 else ""
        self.prefix = f"{name}{suffix}"
        self.progress, self.manifest = (self.folder / f"{kind}{suffix}.json" for kind in ("progress", "manifest"))
        self.file = None  # of the open shard: `tokens` tokens of `split`, where documents start at `starts`
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.progress.with_suffix(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another process is writing to {folder}: wait, or choose another folder with --out.") from None
        self.finished, self.refused = False, True
        try:
            self.restore()
            self.refused = False
        finally:
            if self.refused:
                self.__exit__()

    def restore(self):
        """Takes up what an earlier process committed. Changes nothing where it refuses."""
        complete, begun = read_manifest(self.folder), read_state(self.progress)
        for path in (*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")):
            found = read_state(path)
            for key, value in self.identity.items():
                if found and found.get(key) != value and not (complete and key == "parts") and (
                        path != self.progress or found.get("counts")):
                    raise UserError(f"{self.folder} holds another preparation, with {key.replace('_', ' ')} "
                                    f"{found.get(key)!s:.100} where this has {value!s:.100}: give the same options, or another "
                                    "folder with --out.")
        state = complete or (begun if begun.get("counts") else {}) or read_state(self.manifest)
        self.finished = bool(state) and state is not begun
        ours = re.compile(rf"{re.escape(self.identity['name'])}(_p\d+)?_(train|val)_\d{{6}}\.npy(\.open|\.tmp)?"
                          r"|(manifest|progress)(_p\d+)?\.(json|json\.tmp|lock)")
        mine = re.compile(rf"{re.escape(self.prefix)}_(train|val)_\d{{6}}\.npy.*")
        for path in sorted(self.folder.iterdir()):
            if not ours.fullmatch(path.name) or (mine.fullmatch(path.name) and not state and not begun):
                raise UserError(f"{self.folder} holds files of another origin ({path.name}): choose another folder with --out.")
        self.shards, self.counts = state.get("shards", []), Counter(state.get("counts", {}))
        for shard in self.shards:
            self.check_size(self.folder / shard["file"], shard["tokens"])
        self.cursor = tuple(state.get("cursor", (0, 0, 0)))
        self.ruled, self.split, self.tokens = state.get("ruled", False), state.get("split"), state.get("tokens", 0)
        self.starts = [state.get("starts", [])]
        if self.finished:
            if not complete:
                self.join()  # which may have failed
            return
        if self.tokens:
            path = self.path(self.split, ".open")
            if not path.exists():  # the shard was completed after the commit
                os.replace(self.path(self.split), path)
            self.check_size(path, self.tokens)
            self.file = open(path, "r+b", buffering=0)
            self.file.truncate(HEADER_BYTES + self.tokens * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)
            if self.eot is not None:
                self.starts = [np.flatnonzero(self.open_tokens() == self.eot)]
        if not state:
            for path in self.folder.iterdir():  # begun, and nothing committed
                if mine.fullmatch(path.name):
                    path.unlink()
            self.commit((0, 0, 0))  # from here the folder is this preparation's

    def check_size(self, path: Path, tokens: int):
        if not path.exists() or path.stat().st_size < HEADER_BYTES + tokens * self.dtype.itemsize:
            raise UserError(f"{path} is {'cut off' if path.exists() else 'missing'}, though it was complete: delete "
                            f"{self.folder} and prepare the data again.")

    def append(self, tokens: np.ndarray, starts: np.ndarray, split: str | None = None):
        """Adds tokens; documents start at the places `starts` among them. `split` is "train" or "val" where the source
        decides it."""
        self.ruled = split is None
        while len(tokens):
            if self.tokens == self.shard_tokens:
                self.finish_shard()
            wanted = split or ("train" if self.part or self.shards else "val")
            if self.tokens and wanted != self.split:
                self.finish_shard()
            if not self.tokens:
                self.split = wanted
                self.file = open(self.path(wanted, ".open"), "w+b", buffering=0)
                self.write(bytes(HEADER_BYTES))
            taken = min(len(tokens), self.shard_tokens - self.tokens)
            self.write(np.ascontiguousarray(tokens[:taken], dtype=self.dtype))
            self.starts.append(starts[starts < taken] + self.tokens)
            self.counts.update(tokens=taken, documents=len(self.starts[-1]))
            self.tokens += taken
            tokens, starts = tokens[taken:], starts[starts >= taken] - taken

    def write(self, data):
        data = memoryview(data).cast("B")
        while data:  # a disk that is nearly full takes a part
            data = data[self.file.write(data):]

    def commit(self, cursor: tuple[int, ...]):
        """Makes what was appended last, with `cursor`, the place in the source where the next tokens come from."""
        if self.file:
            os.fsync(self.file.fileno())
        state = {"cursor": cursor, "counts": self.counts, "ruled": self.ruled, "split": self.split, "tokens": self.tokens,
                 "shards": self.shards}
        if self.eot is None:  # else they are found again
            state["starts"] = np.concatenate(self.starts).tolist()
        write_json(self.progress, self.identity | state)

    def finish_shard(self):
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)})
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.path(self.split)
        os.replace(self.path(self.split, ".open"), path)
        self.record(path, self.split, self.tokens, sum(map(len, self.starts)))
        self.file, self.tokens, self.starts = None, 0, []

    def finish(self):
        """Completes the last shard and writes the manifest; of several parts, the last to finish joins all."""
        if not self.counts["documents"] and self.identity["parts"] == 1:
            raise UserError(f"{self.identity['source'].get('name')} holds no text.")
        if self.ruled and self.split == "val" and not self.shards and self.tokens > 1:
            self.divide()
        elif self.tokens:
            self.finish_shard()
        write_json(self.manifest, self.identity | self.counts | {"shards": self.shards})
        if self.identity["parts"] > 1:
            self.join()
        self.finished = True

    def divide(self):
        """Of a corpus that fills no shard the first tenth is validation."""
        tokens, starts = self.open_tokens(), np.concatenate(self.starts)
        cut = max(1, len(tokens) // 10)
        before = int(np.searchsorted(starts, cut))
        for split, part, documents in ("val", tokens[:cut], before), ("train", tokens[cut:], len(starts) - before):
            path = self.path(split)
            write_atomically(path, lambda file, part=part: np.save(file, part))
            self.record(path, split, len(part), documents)

    def record(self, path: Path, split: str, tokens: int, documents: int):
        self.shards.append({"file": path.name, "split": split, "documents": documents, "tokens": tokens, "sha256": sha256(path)})

    def join(self):
        """Writes the manifest of all parts, if this was the last to finish."""
        paths = [self.folder / f"manifest{part_suffix(part)}.json" for part in range(self.identity["parts"])]
        with FileLock(self.folder / "manifest.lock"):
            if not all(path.exists() for path in paths):
                return
            counts, shards = Counter(), []
            for part in map(read_json, paths):
                shards += part["shards"]
                counts.update({name: part[name] for name in part if name not in self.identity and name != "shards"})
            write_json(self.folder / MANIFEST, self.identity | counts | {"shards": shards})
            for path in paths:
                path.unlink(missing_ok=True)  # its own process may be faster

    def open_tokens(self) -> np.ndarray:
        return np.memmap(self.file.name, self.dtype, "r", HEADER_BYTES, (self.tokens,))

    def path(self, split: str, suffix: str = "") -> Path:
        """The shard that comes next, if it is of `split`; ".open" while it grows."""
        return self.folder / f"{self.prefix}_{split}_{len(self.shards):06d}.npy{suffix}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()
        leftovers = [self.progress, self.folder / f"{self.prefix}_val_000000.npy.open"] if self.finished else []
        if (self.folder / MANIFEST).exists():
            leftovers += {self.manifest, self.folder / "manifest.lock"} - {self.folder / MANIFEST}
        for path in leftovers:  # the progress first: without it nothing looks for the rest
            path.unlink(missing_ok=True)
        self.lock.release()
        if self.finished or self.refused:
            self.progress.with_suffix(".lock").unlink(missing_ok=True)


def part_suffix(part: int) -> str:
    return f"_p{part:02d}"


def read_state(path: Path) -> dict:
    """What a progress or manifest file holds; {} where there is none."""
    with contextlib.suppress(ValueError):
        state = read_json(path)
        if isinstance(state, dict) and isinstance(state.get("counts", {}), dict):
            return state
    raise UserError(f"{path} is damaged: delete it with its folder, or choose another folder with --out.")


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
    with one_sentence():
        app.cli(description="What is in a folder of token shards, and whether it is whole.")
