"""Where text comes from: texts with a name, files and folders here, datasets of the Hugging Face Hub, others' shards."""
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

# Texts with a name: where each comes from (None: no public address known) and the sha256 of the file.
NAMED_TEXTS = {
    "tiny_shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tiny_pushkin": (None, "7c6c4d79cfa665fdad789ea74c48b7f9fa4a6e79f8ce63d1f71343c05716e90e"),
}
NAMED_CORPORA = {"openwebtext": "Skylion007/openwebtext"}  # on the Hub
DATA = Path("data")
KINDS = (".parquet", ".jsonl", ".json", ".txt")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


class Source(NamedTuple):
    """What is to be prepared."""
    name: str
    files: list[str]  # paths, or addresses on the Hub
    revision: str  # another one where the text is another
    kind: Literal["text", "corpus", "tokens"]  # one text; documents; shards that others made


def named_source(name: str, text: Path | None, pretokenized: bool, begun: Path) -> Source:
    """What a person calls `name`: a known text, whose file or folder is `text` where there is no network, or a path."""
    if name in NAMED_CORPORA and text is None:
        return hub_source(NAMED_CORPORA[name], None, begun)
    if name in NAMED_TEXTS and text is None:
        text = download(name)
    path = text or Path(name)
    if name in NAMED_TEXTS and path.is_file() and sha256(path) != NAMED_TEXTS[name][1]:
        print(f"{path} is not the {name} that others use: losses will not compare.")
    if not name or not path.exists():
        known = "" if text else f", and no known text (those are {', '.join((*NAMED_TEXTS, *NAMED_CORPORA))})"
        raise UserError(f"There is no file {path}{known}.")
    return shards_source(path_name(path), path) if pretokenized else local_source(path_name(path), path, begun)


def path_name(path: Path) -> str:
    """The last part of the path, as JSON can hold it."""
    return os.fsencode(path.resolve().name).decode(errors="replace")


def is_text(path: Path) -> bool:
    """Whether the file is one text, and not a file of documents."""
    return path.is_file() and kind_of(path.name) not in (".parquet", ".jsonl", ".json")


@functools.lru_cache
def kind_of(path: str) -> str:
    """The suffix that says what a file holds, in small letters, its compression's left out."""
    return Path(path.lower()).with_suffix("").suffix if codec_of(path) else Path(path.lower()).suffix


def codec_of(path: str) -> str | None:
    """How the file is compressed, None where it is not."""
    return COMPRESSION.get(Path(path.lower()).suffix)


def local_source(name: str, path: Path, out: Path | None = None) -> Source:
    """A file, or the files of a folder that hold documents, in the order of their paths; hidden ones, and what is in the
    folder `out`, left out."""
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    own = out.absolute() if out else None
    files = [path] if path.is_file() else sorted(
        file for file in files_below(path) if kind_of(file.name) in KINDS and own not in file.absolute().parents
        and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise UserError(f"{path} holds no documents: {', '.join(KINDS)} files, alone or as .gz or .zst.")
    return Source(name, list(map(str, files)), revision_of(files), "text" if is_text(path) else "corpus")


def files_below(folder: Path) -> Iterator[Path]:
    """All files under the folder, through links too. Raises OSError for a folder that cannot be read."""
    def refuse(error: OSError):
        raise error
    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link led back
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(place, name) for name in names)


def shards_source(name: str, folder: Path) -> Source:
    """The shards in a folder, those for validation first."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: shards come in one.")
    files = sorted((path for pattern in ("*.bin", "*.npy") for path in folder.glob(pattern)),
                   key=lambda path: (split_of(path) != "val", path.name))
    if not files:
        raise UserError(f"{folder} holds no shards, .bin or .npy.")
    return Source(name, list(map(str, files)), revision_of(files), "tokens")


def split_of(shard: Path) -> str | None:
    """"train" or "val" where the shard's name says so."""
    words = re.split(r"[^a-z]+", shard.stem.lower())
    return next((word for word in reversed(words) if word in ("train", "val")), None)


def revision_of(files: list[Path]) -> str:
    """The checksum of a single file, or of the names and sizes of many."""
    if len(files) == 1:
        return sha256(files[0])
    listing = b"".join(b"%s %d\n" % (os.fsencode(path.name), path.stat().st_size) for path in files)
    return hashlib.sha256(listing).hexdigest()


def hub_source(repository: str, subset: str | None, begun: Path) -> Source:
    """The training files of a dataset on the Hub, at the revision with which the folder `begun` was begun.

    What files a subset has is in the repository's card, which `datasets` reads.
    """
    import datasets  # noqa: PLC0415 (the processes that tokenize import this module too)
    earlier = (read_json(path).get("source", {}).get("revision")
               for path in (*begun.glob("manifest*.json"), *begun.glob("progress*.json")))
    try:
        builder = datasets.load_dataset_builder(repository, subset, revision=next(earlier, None))
        files = sorted(builder.config.data_files["train"])
    except Exception as error:  # every layer between here and the network has exceptions of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repository} could not be found on the Hugging Face Hub ({type(error).__name__}: {reason}).") from None
    revision = re.search(r"@([^/]+)/", files[0])[1]
    return Source(f"{repository}:{subset}" if subset else repository, files, revision, "corpus")


def download(name: str) -> Path:
    """A named text, in data/downloads; later calls find it there."""
    url, expected = NAMED_TEXTS[name]
    if url is None:
        raise UserError(f"{name} has no address to download from: give its file with --text FILE.")
    return fetch(url, expected, DATA / "downloads" / f"{name}.txt", "--text")


def fetch(url: str, expected: str, path: Path, option: str) -> Path:
    """The file at `url`, whose sha256 is `expected`, as `path`; a download that broke off goes on. Raises UserError, which names
    the command's `option` for a file from elsewhere, where it cannot be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # of several processes one downloads
        if not path.exists() or sha256(path) != expected:
            fetch_alone(url, expected, path, option)
    return path


def fetch_alone(url: str, expected: str, path: Path, option: str):
    import requests  # noqa: PLC0415 (the processes that tokenize import this module too)
    part = path.with_name(f"{path.name}.tmp")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with requests.get(url, stream=True, timeout=30, headers=headers) as response:
            if response.status_code != 416:  # it is all there already
                response.raise_for_status()
                have *= response.status_code == 206
                left = int(response.headers.get("Content-Length", 0))
                with open(part, "ab" if have else "wb") as file, tqdm(
                        total=have + left or None, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                    for chunk in response.iter_content(1 << 16):
                        bar.update(file.write(chunk))
    except requests.RequestException as error:
        raise UserError(f"{url} could not be downloaded ({type(error).__name__}): the same command goes on with it, or fetch it "
                        f"elsewhere and give it with {option} FILE.") from None
    if sha256(part) != expected:
        part.unlink()
        raise UserError(f"{url} did not deliver the expected file (its sha256 differs): try again, or use {option} FILE.")
    os.replace(part, path)
