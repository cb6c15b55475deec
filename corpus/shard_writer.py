"""Token shards onto the disk, so that a process may die at any moment and another go on.

    with ShardWriter(folder, name, tokenizer, source) as writer:
        for … in everything after writer.cursor:
            writer.append(tokens, starts)
            writer.commit(cursor)  # what is killed later goes on from here
        writer.finish()

The shard that grows is `<name>_train_000007.npy.open`; `progress.json` says how much of it counts, and where in the source
the next tokens are. Both go when `manifest.json` is there. Several processes, each with a part of the source, have a
`progress_p03.json` and a `manifest_p03.json` of their own until the last to finish joins these.
"""
import contextlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import read_json, sha256, write_atomically, write_json
from shards import MANIFEST, read_manifest
from tokenizer import Tokenizer

HEADER_BYTES = 128  # of a .npy file with one dimension


class ShardWriter:
    """Writes a corpus, or one of several parts of it, into shards of `shard_tokens`; the first of all is validation.

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
        state = complete or (begun if begun.get("counts") else {}) or read_state(self.manifest)
        self.finished = bool(state) and state is not begun
        mine = re.compile(rf"{re.escape(self.prefix)}_(train|val)_\d{{6}}\.npy.*")
        self.refuse_others(bool(complete), mine if not begun and not state else None)
        self.shards, self.counts = state.get("shards", []), Counter(state.get("counts", {}))
        for shard in self.shards:
            self.check_size(self.folder / shard["file"], shard["tokens"])
        self.cursor = tuple(state.get("cursor", (0, 0, 0)))
        self.ruled, self.split, self.tokens = state.get("ruled", False), state.get("split"), state.get("tokens", 0)
        self.starts = [state.get("starts", [])]
        if self.finished:
            if not complete:
                self.join()  # which may have failed
        elif self.tokens:
            self.reopen()
        elif not state:
            for path in self.folder.iterdir():  # begun, and nothing committed
                if mine.fullmatch(path.name):
                    path.unlink()
            self.commit((0, 0, 0))  # from here the folder is this preparation's

    def refuse_others(self, complete: bool, unaccounted: re.Pattern | None):
        """Raises UserError where the folder holds another preparation, or files that are none's or `unaccounted` for."""
        for path in (*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")):
            found = read_state(path)
            if path == self.progress and not found.get("counts"):  # nothing was committed
                continue
            for key, value in self.identity.items():
                if found and found.get(key) != value and not (complete and key == "parts"):
                    raise UserError(f"{self.folder} holds another preparation, with {key.replace('_', ' ')} "
                                    f"{found.get(key)!s:.100} where this has {value!s:.100}: give the same options, or another "
                                    "folder with --out.")
        ours = re.compile(rf"{re.escape(self.identity['name'])}(_p\d+)?_(train|val)_\d{{6}}\.npy(\.open|\.tmp)?"
                          r"|(manifest|progress)(_p\d+)?\.(json|json\.tmp|lock)")
        for path in sorted(self.folder.iterdir()):
            if not ours.fullmatch(path.name) or (unaccounted and unaccounted.fullmatch(path.name)):
                raise UserError(f"{self.folder} holds files of another origin ({path.name}): choose another folder with --out.")

    def reopen(self):
        """The shard that grew, as it was at the commit."""
        path, completed = self.path(self.split, ".open"), self.path(self.split)
        self.check_size(path if path.exists() else completed, self.tokens)
        if not path.exists():  # the shard was completed after the commit
            os.replace(completed, path)
        self.file = open(path, "r+b", buffering=0)
        self.file.truncate(HEADER_BYTES + self.tokens * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)
        if self.eot is not None:
            self.starts = [np.flatnonzero(self.open_tokens() == self.eot)]

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
