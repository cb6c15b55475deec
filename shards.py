"""Token shards on disk. A split reads as one stream of tokens, memory-mapped.

    python shards.py info data/tiny_shakespeare_char         # contents, with a sample
    python shards.py verify data/tiny_shakespeare_char       # compares the files with the manifest

    data/tiny_shakespeare_char/
        tiny_shakespeare_val_000000.npy      1-D uint16 (uint32 for a vocabulary above 65,536)
        tiny_shakespeare_train_000001.npy    shards of both splits share one running index
        manifest.json                        source, tokenizer; documents, tokens, sha256 per shard

Shards of other projects are read as they are: build-nanogpt's `.npy`, the `.bin` of llm.c and
modded-nanogpt with its 1024-byte header, and nanoGPT's raw `train.bin` and `val.bin`.
"""
import bisect
import contextlib
import hashlib
import re
from pathlib import Path

from common.program import report_user_errors

import numpy as np
import tyro
from tqdm import tqdm

from common.errors import UserError
from common.files import read_json, sha256
from tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
SPLITS = ("val", "train")

# llm.c's header: 256 int32, of which the first three are magic number, version, number of tokens
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {20240520: np.uint16, 20240801: np.uint32}  # by magic number: GPT-2's ids, Llama 3's


class Shards:
    """The tokens of one split as one stream: `len()` and `read(start, stop)`.

    Pass the folder's manifest if it has been read already. Raises UserError if the folder has no
    shards of this split, or if one is missing or cut off.
    """

    def __init__(self, folder, split: str, manifest: dict | None = None):
        folder = Path(folder)
        if manifest is None:
            manifest = read_manifest(folder)
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        unfinished = any(folder.glob("progress*.json")) or any(folder.glob("manifest_p*.json"))
        if not manifest and unfinished:
            raise UserError(f"{folder} is not finished: run the command that prepares it again.")

        # list the shards: those in the manifest, or those with the names of other projects
        listed = {folder / shard["file"]: shard["tokens"]
                  for shard in manifest.get("shards", ()) if shard["split"] == split}
        self.files = list(listed)
        if not manifest:
            pattern = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
            self.files = sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))
        if not self.files:
            raise UserError(f"{folder} holds no {split} shards: create them with prepare.py.")

        # open them
        allow_open_files(len(self.files))
        self.arrays = [open_shard(path) for path in self.files]
        for path, array in zip(self.files, self.arrays):
            expected = listed.get(path, len(array))
            if len(array) != expected:
                raise UserError(f"{path} holds {len(array):,} tokens but the manifest says "
                                f"{expected:,}: prepare the data again.")
        self.ends = np.cumsum([len(array) for array in self.arrays]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 of the stream, which may span shards.

        Requires 0 <= start < stop <= len.
        """
        pieces = []
        shard = bisect.bisect_right(self.ends, start)
        while start < stop:
            offset = self.ends[shard] - len(self.arrays[shard])
            pieces.append(self.arrays[shard][start - offset:stop - offset])
            start = self.ends[shard]
            shard += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def allow_open_files(number: int):
    """Raises this process's limit on open files for that many shards, if the system allows it."""
    needed = 2 * number + 256
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 (not on Windows)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            limit = needed if hard < 0 else min(hard, needed)  # hard < 0: unlimited
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def read_manifest(folder) -> dict:
    """The folder's manifest.json, or {} if it has none (shards of other projects)."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        manifest = read_json(path)
        if is_valid_manifest(manifest):
            return manifest
    raise UserError(f"{path} is not a manifest of format 1: "
                    f"delete {folder} and prepare the data again.")


def is_valid_manifest(manifest: dict) -> bool:
    """Whether the manifest has the format that this version writes."""
    files = {shard["file"] for shard in manifest["shards"]}
    return (manifest["format"] == 1 and isinstance(manifest["tokenizer"], dict)
            and isinstance(manifest["source"], dict) and manifest["documents"] >= 0
            and manifest["tokens"] > 0 and 0 < len(files) == len(manifest["shards"])
            and all(map(is_valid_shard, manifest["shards"])))


def is_valid_shard(shard: dict) -> bool:
    """Whether a shard's entry in a manifest has the format that this version writes."""
    is_file_name = Path(shard["file"]).name == shard["file"]  # not a path out of the folder
    return (is_file_name and shard["split"] in SPLITS and shard["sha256"].isalnum()
            and shard["tokens"] > 0 and shard["documents"] >= 0)


def read_tokenizer(folder, manifest: dict | None = None) -> Tokenizer:
    """The tokenizer of the folder's shards: its manifest's, else nanoGPT's meta.pkl, else GPT-2's.

    Pass the manifest if it has been read already.
    """
    if manifest is None:
        manifest = read_manifest(folder)
    if manifest:
        return load_tokenizer(manifest["tokenizer"])
    has_meta = (Path(folder) / "meta.pkl").exists()
    return load_tokenizer(Path(folder) if has_meta else "gpt2")


def open_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard: `.npy`, llm.c's `.bin`, or raw uint16 as nanoGPT writes it."""
    read_header = read_npy_header if path.suffix == ".npy" else read_bin_header
    try:
        shape, dtype, offset = read_header(path)
        # numpy maps no other type safely: one of no bytes ends the process
        if dtype not in (np.uint16, np.uint32):
            raise ValueError("expected uint16 or uint32")
        tokens = np.memmap(path, dtype, "r", offset, shape)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError("expected a 1-D array of tokens")
    except FileNotFoundError:
        raise UserError(f"{path} is missing but listed in the manifest: "
                        "prepare the data again.") from None
    except OSError:
        raise
    except Exception as error:  # numpy runs Python's tokenizer on a header, which raises anything
        raise UserError(f"{path} is cut off or not a token shard ({error}): "
                        "prepare the data again.") from None
    return np.asarray(tokens)  # slicing an np.memmap is slow


def read_npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type, position of the first token) of a `.npy` file."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    with open(path, "rb") as file:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
        return shape, dtype, file.tell()


def read_bin_header(path: Path) -> tuple[None, np.dtype, int]:
    """(None, type, position of the first token) of a `.bin` file: it holds tokens up to its end."""
    header = np.fromfile(path, dtype=np.int32, count=3).tolist()
    if len(header) < 3 or header[0] not in LLMC_DTYPES:
        return None, np.dtype(np.uint16), 0  # nanoGPT's, without a header
    dtype = np.dtype(LLMC_DTYPES[header[0]])
    if path.stat().st_size != LLMC_HEADER_BYTES + dtype.itemsize * header[2]:
        raise ValueError(f"its header announces {header[2]:,} tokens")
    return None, dtype, LLMC_HEADER_BYTES


def sample_checksum(folder, manifest: dict) -> str:
    """A checksum of the lengths of all shards, and of 16 pieces of 64 tokens from each."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for array in Shards(folder, split, manifest).arrays:
            digest.update(str(len(array)).encode())
            for start in np.linspace(0, len(array) - 1, 16, dtype=np.int64):
                digest.update(array[start:start + 64].tobytes())
    return digest.hexdigest()[:16]


def check_ids(tokens: np.ndarray, vocab_size: int, where):
    """Raises UserError, naming the place `where`, if an id is outside the vocabulary."""
    largest = tokens.max()
    if largest >= vocab_size:
        raise UserError(f"{where} holds the id {largest:,}, but its tokenizer has {vocab_size:,} "
                        "ids: it is damaged or was made with another tokenizer.")


# --------------------------------------------------------------------------------------------------
# Command line

app = tyro.extras.SubcommandApp()


@app.command
def verify(folder: tyro.conf.Positional[Path]):
    """Compares every shard with the manifest. Stops at the first that differs."""
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    entries = {folder / shard["file"]: shard for shard in manifest.get("shards", ())}
    splits = [Shards(folder, split, manifest) for split in SPLITS]
    arrays = [pair for shards in splits for pair in zip(shards.files, shards.arrays)]

    # compare each shard with its entry
    for path, tokens in tqdm(arrays, unit="shard", leave=False):
        entry = entries.get(path)
        if entry and sha256(path) != entry["sha256"]:
            raise UserError(f"{path} is damaged (its sha256 differs from the manifest's): "
                            "prepare the data again.")
        check_ids(tokens, tokenizer.vocab_size, path)
        if entry and tokenizer.eot is not None:
            documents = np.count_nonzero(tokens == tokenizer.eot)
            if documents != entry["documents"]:
                raise UserError(f"{path} holds {documents:,} documents but the manifest says "
                                f"{entry['documents']:,}: prepare the data again.")

    # compare the totals and the list of files
    if manifest:
        for key in "tokens", "documents":
            total = sum(shard[key] for shard in entries.values())
            if manifest[key] != total:
                raise UserError(f"{folder / MANIFEST} says {manifest[key]:,} {key}, but its shards "
                                f"add up to {total:,}: prepare the data again.")
        unlisted = set(folder.glob("*.npy")) - set(entries)
        if unlisted:
            raise UserError(f"{min(unlisted)} is not in the manifest: "
                            "it does not belong to this corpus.")

    result = "all match the manifest" if manifest else "all readable (no manifest to compare with)"
    print(f"{len(arrays)} shards, {sum(map(len, splits)):,} tokens: {result}")


@app.command
def info(folder: tyro.conf.Positional[Path]):
    """Prints documents, tokens, bytes per token, and the start of a document for each split."""
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    if manifest:
        name = manifest["source"].get("name", "unknown source")
        print(f"{name}, tokenizer {tokenizer.kind} with {tokenizer.vocab_size:,} ids")
    for split in "train", "val":
        shards = Shards(folder, split, manifest)
        documents = "unknown"
        if manifest:
            entries = [shard for shard in manifest["shards"] if shard["split"] == split]
            documents = f"{sum(shard['documents'] for shard in entries):,}"
        sample = shards.read(0, min(len(shards), 100_000))
        bytes_per_token = len(tokenizer.decode_bytes(sample.tolist())) / len(sample)
        print(f"{split}: {documents} documents, {len(shards):,} tokens in {len(shards.files)} "
              f"shards, {bytes_per_token:.2f} bytes per token")

        # print the start of the first document that starts in the sample
        begin = int(np.argmax(sample == tokenizer.eot)) if tokenizer.eot is not None else 0
        print(tokenizer.decode(sample[begin:begin + 50].tolist()))


if __name__ == "__main__":
    with report_user_errors():
        app.cli(description="Show or verify a folder of token shards.")
