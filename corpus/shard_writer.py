"""Write token shards so that a killed process can be resumed.

    with ShardWriter(folder, name, tokenizer, source) as writer:
        for … in everything after writer.cursor:
            writer.append(tokens, starts)
            writer.commit(cursor)  # a later process resumes here
        writer.finish()

The growing shard is named `<name>_train_000007.npy.open`. `progress.json` holds the state at the
last commit: the length of the growing shard, and the cursor of the source. `manifest.json` replaces
both at the end. If several processes each write a part, part 3 has `progress_p03.json` and
`manifest_p03.json`; the last process to finish joins the manifests of all parts.
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
from shards import MANIFEST, SPLITS, is_valid_shard, read_manifest
from tokenizer import Tokenizer

HEADER_BYTES = 128  # of a .npy file with one dimension
SHARD_NAME = r"(_p\d+)?_(train|val)_\d{6}\.npy(\.open|\.tmp)?"  # after the corpus's name
STATE_NAME = r"(manifest|progress)(_p\d+)?\.(json|json\.tmp|lock)"


class ShardWriter:
    """Writes a corpus, or one of its parts, into shards of `shard_tokens` tokens.

    The first shard of all is for validation, unless the source decides the splits. Raises UserError
    if another process writes to the folder, or if it holds anything but the same preparation.
    """

    def __init__(self, folder, name: str, tokenizer: Tokenizer, source: dict,
                 shard_tokens: int = 10**8, part: int = 0, parts: int = 1):
        self.folder = Path(folder)
        self.part = part
        self.shard_tokens = shard_tokens
        self.eot = tokenizer.eot
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        # what must be equal for a preparation to be resumed
        self.identity = {"format": 1, "name": name, "source": source,
                         "tokenizer": tokenizer.to_dict(), "shard_tokens": shard_tokens,
                         "parts": parts}
        suffix = part_suffix(part) if parts > 1 else ""
        self.prefix = f"{name}{suffix}"
        self.progress_path = self.folder / f"progress{suffix}.json"
        self.manifest_path = self.folder / f"manifest{suffix}.json"
        self.file = None  # of the growing shard

        # lock the folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.progress_path.with_suffix(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another process is writing to {folder}: wait for it, or choose "
                            "another folder with --out.") from None

        # resume an earlier process
        self.finished = False
        self.refused = True
        try:
            self.restore()
            self.refused = False
        finally:
            if self.refused:
                self.__exit__()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()

        # delete what the manifest replaces
        obsolete = []
        if self.finished:
            # progress first: without it nothing refers to the other files
            obsolete += [self.progress_path, self.folder / f"{self.prefix}_val_000000.npy.open"]
        if (self.folder / MANIFEST).exists():
            obsolete.append(self.folder / "manifest.lock")
            if self.manifest_path.name != MANIFEST:
                obsolete.append(self.manifest_path)
        for path in obsolete:
            path.unlink(missing_ok=True)

        self.lock.release()
        if self.finished or self.refused:
            self.progress_path.with_suffix(".lock").unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------
    # Resuming

    def restore(self):
        """Resume from the last commit. Changes nothing if it raises UserError."""
        # find the state of an earlier process
        complete = read_manifest(self.folder)
        manifest = complete or read_state(self.manifest_path)
        state = manifest or read_state(self.progress_path)
        self.finished = bool(manifest)

        # refuse a folder with other files
        own_shard = re.compile(rf"{re.escape(self.prefix)}_(train|val)_\d{{6}}\.npy.*")
        self.refuse_other_preparation(complete=bool(complete))
        self.refuse_other_files(None if state else own_shard)
        self.shards = state.get("shards", [])
        for shard in self.shards:
            self.check_size(self.folder / shard["file"], shard["tokens"])

        # restore the state
        self.cursor = tuple(state.get("cursor", (0, 0, 0)))
        self.counts = Counter(state.get("counts", {}))
        self.auto_split = state.get("ruled", False)  # True if the source leaves the splits to us
        self.split = state.get("split")  # of the growing shard
        self.tokens = state.get("tokens", 0)  # in the growing shard
        # arrays of indices where its documents start
        self.starts = [np.array(state.get("starts", []), dtype=np.int64)]
        if self.finished:
            if not complete:
                self.join_parts()  # an earlier process may have failed to
        elif self.tokens:
            self.reopen_shard()
        elif not self.counts:
            for path in self.folder.iterdir():  # shards without a commit
                if own_shard.fullmatch(path.name):
                    path.unlink()
            self.commit((0, 0, 0))  # claims the folder for this preparation

    def refuse_other_preparation(self, complete: bool):
        """Raises UserError if the folder holds a preparation with other options."""
        for path in (*self.folder.glob("progress*.json"), *self.folder.glob("manifest*.json")):
            state = read_state(path)
            if not state or (path == self.progress_path and not state.get("counts")):
                continue  # nothing was committed
            for key, value in self.identity.items():
                if complete and key == "parts":
                    continue
                if state.get(key) != value:
                    option = key.replace("_", " ")
                    raise UserError(f"{self.folder} holds another preparation ({option}: "
                                    f"{state.get(key)!s:.100}, not {value!s:.100}): give the same "
                                    "options, or choose another folder with --out.")

    def refuse_other_files(self, unexpected: re.Pattern | None):
        """Raises UserError if the folder holds files that no ShardWriter wrote, or `unexpected`."""
        shard_name = rf"{re.escape(self.identity['name'])}{SHARD_NAME}"
        expected = re.compile(f"{shard_name}|{STATE_NAME}")
        for path in sorted(self.folder.iterdir()):
            if not expected.fullmatch(path.name) or (
                    unexpected and unexpected.fullmatch(path.name)):
                raise UserError(f"{self.folder} holds files that do not belong to this preparation "
                                f"({path.name}): choose another folder with --out.")

    def reopen_shard(self):
        """Opens the growing shard as it was at the commit."""
        path = self.shard_path(self.split, ".open")
        completed = self.shard_path(self.split)
        self.check_size(path if path.exists() else completed, self.tokens)
        if not path.exists():  # it was completed after the commit
            os.replace(completed, path)
        self.file = open(path, "r+b", buffering=0)
        self.file.truncate(HEADER_BYTES + self.tokens * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)
        if self.eot is not None:
            self.starts = [np.flatnonzero(self.growing_tokens() == self.eot)]

    def check_size(self, path: Path, tokens: int):
        """Raises UserError if the file is missing or holds fewer tokens."""
        needed = HEADER_BYTES + tokens * self.dtype.itemsize
        if not path.exists() or path.stat().st_size < needed:
            problem = "cut off" if path.exists() else "missing"
            raise UserError(f"{path} is {problem}, although it was complete: "
                            f"delete {self.folder} and prepare the data again.")

    # ----------------------------------------------------------------------------------------------
    # Writing

    def append(self, tokens: np.ndarray, starts: np.ndarray, split: str | None = None):
        """Append tokens, of which those at the indices `starts` start a document.

        `split` is "train" or "val", or None to make the first shard of all the validation split.
        """
        self.auto_split = split is None
        while len(tokens):
            # finish the shard if it is full or belongs to the other split
            if self.tokens == self.shard_tokens:
                self.finish_shard()
            is_first = self.part == 0 and not self.shards
            next_split = split or ("val" if is_first else "train")
            if self.tokens and next_split != self.split:
                self.finish_shard()

            # begin a shard
            if not self.tokens:
                self.split = next_split
                self.file = open(self.shard_path(next_split, ".open"), "w+b", buffering=0)
                self.write(bytes(HEADER_BYTES))

            # fill it
            n = min(len(tokens), self.shard_tokens - self.tokens)
            self.write(np.ascontiguousarray(tokens[:n], dtype=self.dtype))
            self.starts.append(starts[starts < n] + self.tokens)
            self.counts.update(tokens=n, documents=len(self.starts[-1]))
            self.tokens += n
            tokens = tokens[n:]
            starts = starts[starts >= n] - n

    def write(self, data):
        data = memoryview(data).cast("B")
        while data:  # a nearly full disk accepts only a part
            data = data[self.file.write(data):]

    def commit(self, cursor: tuple[int, ...]):
        """Saves the state: all tokens appended so far, and the source's cursor after them."""
        if self.file:
            os.fsync(self.file.fileno())
        state = {"cursor": cursor, "counts": self.counts, "ruled": self.auto_split,
                 "split": self.split, "tokens": self.tokens, "shards": self.shards}
        if self.eot is None:  # otherwise the tokens tell where documents start
            state["starts"] = np.concatenate(self.starts).tolist()
        write_json(self.progress_path, self.identity | state)

    def finish_shard(self):
        """Writes the growing shard's header and gives it its final name."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.shard_path(self.split)
        os.replace(self.shard_path(self.split, ".open"), path)
        self.record(path, self.split, self.tokens, sum(map(len, self.starts)))
        self.file = None
        self.tokens = 0
        self.starts = []

    def finish(self):
        """Finish the last shard and write the manifest; the last of several parts joins them."""
        if not self.counts["documents"] and self.identity["parts"] == 1:
            raise UserError(f"{self.identity['source'].get('name')} holds no text.")
        only_val = self.split == "val" and not self.shards
        if self.auto_split and only_val and self.tokens > 1:
            self.split_small_corpus()
        elif self.tokens:
            self.finish_shard()
        write_json(self.manifest_path, self.identity | self.counts | {"shards": self.shards})
        if self.identity["parts"] > 1:
            self.join_parts()
        self.finished = True

    def split_small_corpus(self):
        """Use the first 10% of a corpus that does not fill one shard for validation."""
        tokens = self.growing_tokens()
        starts = np.concatenate(self.starts)
        cut = max(1, len(tokens) // 10)
        val_documents = int(np.searchsorted(starts, cut))
        self.save_shard("val", tokens[:cut], val_documents)
        self.save_shard("train", tokens[cut:], len(starts) - val_documents)

    def save_shard(self, split: str, tokens: np.ndarray, documents: int):
        path = self.shard_path(split)
        write_atomically(path, lambda file: np.save(file, tokens))
        self.record(path, split, len(tokens), documents)

    def record(self, path: Path, split: str, tokens: int, documents: int):
        """Adds a finished shard to the list in the manifest."""
        self.shards.append({"file": path.name, "split": split, "documents": documents,
                            "tokens": tokens, "sha256": sha256(path)})

    def join_parts(self):
        """Writes the manifest of all parts if all are finished."""
        parts = range(self.identity["parts"])
        paths = [self.folder / f"manifest{part_suffix(part)}.json" for part in parts]
        with FileLock(self.folder / "manifest.lock"):
            if not all(path.exists() for path in paths):
                return
            counts = Counter()
            shards = []
            for manifest in map(read_json, paths):
                shards += manifest.pop("shards")
                counts.update({key: manifest[key] for key in manifest if key not in self.identity})
            write_json(self.folder / MANIFEST, self.identity | counts | {"shards": shards})
            for path in paths:
                path.unlink(missing_ok=True)  # the part's own process may have deleted it

    def growing_tokens(self) -> np.ndarray:
        return np.memmap(self.file.name, self.dtype, "r", HEADER_BYTES, (self.tokens,))

    def shard_path(self, split: str, suffix: str = "") -> Path:
        """Returns the path of the next shard, with the suffix ".open" while it grows."""
        return self.folder / f"{self.prefix}_{split}_{len(self.shards):06d}.npy{suffix}"


def part_suffix(part: int) -> str:
    return f"_p{part:02d}"


def read_state(path: Path) -> dict:
    """Returns the content of a progress or manifest file, or {} if there is none."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        state = read_json(path)
        if is_valid_state(state):
            return state
    raise UserError(f"{path} is damaged: delete its folder and prepare the data again, or choose "
                    "another folder with --out.")


def is_valid_state(state: dict) -> bool:
    """Whether the values from which a writer resumes have the types that `commit` writes."""
    cursor = state.get("cursor", [0, 0, 0])
    numbers = [*cursor, *state.get("counts", {}).values(), state.get("tokens", 0)]
    starts = state.get("starts", [])  # earlier versions wrote them as 0.0, 1200.0, …
    return (len(cursor) == 3 and all(isinstance(n, int) and n >= 0 for n in numbers)
            and isinstance(starts, list) and all(0 <= n < 2**63 and n == int(n) for n in starts)
            and state.get("split") in (None, *SPLITS)
            and all(map(is_valid_shard, state.get("shards", []))))
