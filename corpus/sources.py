"""Find the files to prepare: named texts, local files and folders, datasets on the Hub, shards."""
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from common.errors import UserError
from common.files import read_json, sha256

# `datasets` and `requests` are imported when needed: both take long

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
# name -> (address, None if it is not public; sha256 of the file)
NAMED_TEXTS = {
    "tiny_shakespeare": (TINY_SHAKESPEARE_URL,
                         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tiny_pushkin": (None, "7c6c4d79cfa665fdad789ea74c48b7f9fa4a6e79f8ce63d1f71343c05716e90e"),
}
NAMED_CORPORA = {"openwebtext": "Skylion007/openwebtext"}  # name -> dataset on the Hub
DATA = Path("data")
KINDS = (".parquet", ".jsonl", ".json", ".txt")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


class Source(NamedTuple):
    """The text or tokens to prepare."""
    name: str
    files: list[str]  # local paths, or addresses on the Hub
    revision: str  # differs if the content differs
    kind: Literal["text", "corpus", "tokens"]  # a single text, documents, or existing shards


def find_source(name: str, text: Path | None, pretokenized: bool, out: Path) -> Source:
    """Finds the source that the user calls `name`: a named text or corpus, or a path.

    `text` replaces the download of a named one. `out` is the output folder, which an earlier call
    may have begun.
    """
    if name in NAMED_CORPORA and text is None:
        return hub_source(NAMED_CORPORA[name], None, out)
    if name in NAMED_TEXTS and text is None:
        text = download(name)
    path = text or Path(name)
    if name in NAMED_TEXTS and path.is_file() and sha256(path) != NAMED_TEXTS[name][1]:
        print(f"{path} is not the usual {name}: losses will not be comparable with published ones.")
    if not name or not path.exists():
        names = "" if text else f"; known names are {', '.join((*NAMED_TEXTS, *NAMED_CORPORA))}"
        raise UserError(f"There is no file or folder {path}{names}.")
    if pretokenized:
        return shards_source(path_name(path), path)
    return local_source(path_name(path), path, out)


# --------------------------------------------------------------------------------------------------
# Local files

def path_name(path: Path) -> str:
    """Returns the last part of the path as valid Unicode."""
    return os.fsencode(path.resolve().name).decode(errors="replace")


def is_text(path: Path) -> bool:
    """Whether the file is a single text, not a file of documents."""
    return path.is_file() and kind_of(path.name) not in (".parquet", ".jsonl", ".json")


@functools.lru_cache
def kind_of(path: str) -> str:
    """Returns the suffix in lower case, without that of a compression: ".jsonl" for x.JSONL.gz."""
    lower = Path(path.lower())
    return lower.with_suffix("").suffix if codec_of(path) else lower.suffix


def codec_of(path: str) -> str | None:
    """Returns "gzip", "zstd", or None if the file is not compressed."""
    return COMPRESSION.get(Path(path.lower()).suffix)


def local_source(name: str, path: Path, out: Path | None = None) -> Source:
    """Returns a file, or all document files below a folder, sorted by path.

    Hidden files and the output folder `out` are left out.
    """
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")

    def is_document(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        is_output = out is not None and out.absolute() in file.absolute().parents
        return kind_of(file.name) in KINDS and not hidden and not is_output

    files = sorted(filter(is_document, walk_files(path))) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no documents: expected {', '.join(KINDS)} files, "
                        "optionally compressed as .gz or .zst.")
    kind = "text" if is_text(path) else "corpus"
    return Source(name, [str(file) for file in files], revision_of(files), kind)


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields all files below the folder, following links. Raises OSError for unreadable folders."""
    def refuse(error: OSError):
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            yield Path(place, name)


def revision_of(files: list[Path]) -> str:
    """Returns the sha256 of a single file, or of the names and sizes of several.

    Raises UserError for what is not a file, such as a pipe, which can be read only once.
    """
    for path in files:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file: copy what it holds into a file first.")
    if len(files) == 1:
        return sha256(files[0])
    lines = [b"%s %d\n" % (os.fsencode(path.name), path.stat().st_size) for path in files]
    return hashlib.sha256(b"".join(lines)).hexdigest()


# --------------------------------------------------------------------------------------------------
# Existing shards

def shards_source(name: str, folder: Path) -> Source:
    """Returns the shards in a folder, those for validation first."""
    files = [*folder.glob("*.bin"), *folder.glob("*.npy")]
    files.sort(key=lambda path: (split_of(path) != "val", path.name))
    if not files:
        raise UserError(f"{folder} holds no shards: expected .bin or .npy files.")
    return Source(name, [str(file) for file in files], revision_of(files), "tokens")


def split_of(shard: Path) -> str | None:
    """Returns "train" or "val" if the shard's name says so."""
    words = re.split(r"[^a-z]+", shard.stem.lower())
    splits = [word for word in words if word in ("train", "val")]
    return splits[-1] if splits else None


# --------------------------------------------------------------------------------------------------
# The Hub and downloads

def hub_source(repository: str, subset: str | None, out: Path) -> Source:
    """Returns the training files of a dataset on the Hub; `datasets` reads its card to find them.

    If an earlier call began to fill the folder `out`, the dataset's revision is that of this call.
    """
    import datasets  # noqa: PLC0415
    try:
        revision = earlier_revision(out)
        builder = datasets.load_dataset_builder(repository, subset, revision=revision)
        files = sorted(builder.config.data_files["train"])
    except Exception as error:  # the Hub's client and the layers below raise their own types
        raise UserError(f"{repository} was not found on the Hugging Face Hub "
                        f"({type(error).__name__}: {error}).") from None
    revision = re.search(r"@([^/]+)/", files[0])[1]
    name = f"{repository}:{subset}" if subset else repository
    return Source(name, files, revision, "corpus")


def earlier_revision(out: Path) -> str | None:
    """Returns the source's revision that the folder's manifest or progress file names, if any."""
    for path in (*out.glob("manifest*.json"), *out.glob("progress*.json")):
        return read_json(path).get("source", {}).get("revision")
    return None


def download(name: str) -> Path:
    """Downloads a named text into data/downloads, unless it is there already."""
    url, expected = NAMED_TEXTS[name]
    if url is None:
        raise UserError(f"{name} has no public address: give its file with --text FILE.")
    return fetch(url, expected, DATA / "downloads" / f"{name}.txt", "--text")


def fetch(url: str, expected: str, path: Path, option: str) -> Path:
    """Downloads the file with the sha256 `expected` to `path`, unless it is there already.

    An interrupted download is resumed. Raises UserError if it fails; the message names `option`,
    with which the user can give the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # only one process downloads
        if not path.exists() or sha256(path) != expected:
            download_file(url, expected, path, option)
    return path


def download_file(url: str, expected: str, path: Path, option: str):
    import requests  # noqa: PLC0415

    # request what is missing
    partial = path.with_name(f"{path.name}.tmp")
    size = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size}-"}
    try:
        with requests.get(url, stream=True, timeout=30, headers=headers) as response:
            if response.status_code != 416:  # 416: nothing is missing
                response.raise_for_status()
                if response.status_code != 206:  # the server sends the whole file
                    size = 0
                total = size + int(response.headers.get("Content-Length", 0))
                bar = tqdm(total=total or None, initial=size, unit="B", unit_scale=True,
                           desc=path.name)
                with open(partial, "ab" if size else "wb") as file, bar:
                    for chunk in response.iter_content(1 << 16):
                        bar.update(file.write(chunk))
    except requests.RequestException as error:
        raise UserError(f"{url} could not be downloaded ({type(error).__name__}): run the same "
                        "command again to resume, or download it elsewhere and give it with "
                        f"{option} FILE.") from None

    # check the content
    if sha256(partial) != expected:
        partial.unlink()
        raise UserError(f"The download of {url} is not the expected file (its sha256 differs): "
                        f"try again, or give the file with {option} FILE.")
    os.replace(partial, path)
