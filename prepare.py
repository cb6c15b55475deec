"""Any text into token shards.

    python prepare.py tiny_shakespeare --tokenizer char      # downloads it; --text FILE where there is no network
    python prepare.py tiny_pushkin --text tiny_pushkin.txt --tokenizer gpt2
    python prepare.py my_novel.txt --tokenizer gpt2 --out data/novel

The last 10% of the characters are validation, as in nanoGPT. The result goes to data/<name>_<tokenizer>.
"""
import dataclasses
import os
import re
from pathlib import Path

import requests
import tyro
from tqdm import tqdm

from checkpoint import load_model
from errors import UserError, one_sentence
from files import sha256
from shards import ShardWriter
from tokenizer import CharTokenizer, Tokenizer, load_tokenizer

# Texts with a name: where each comes from (None: no public address known) and the sha256 of the file.
NAMED_TEXTS = {
    "tiny_shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tiny_pushkin": (None, "7c6c4d79cfa665fdad789ea74c48b7f9fa4a6e79f8ce63d1f71343c05716e90e"),
}
DATA = Path("data")
TRAIN_SHARE = 0.9  # of the characters


@dataclasses.dataclass
class PrepareConfig:
    """Turns a text into token shards, the last 10% of its characters for validation."""

    source: tyro.conf.Positional[str]
    """tiny_shakespeare, tiny_pushkin, or a text file."""
    tokenizer: str = "char"
    """char (an id for each character of the text), gpt2, or a model, under any of its names, whose tokenizer is used."""
    text: Path | None = None
    """The file that holds a named text, where there is no network."""
    out: Path | None = None
    """Folder for the shards; data/<name>_<tokenizer> when not given."""


def main(config: PrepareConfig):
    path = find_text(config.source, config.text)
    text = read_text(path)
    name = Path(config.source).stem
    out = config.out or DATA / f"{name}_{re.sub(r'[^A-Za-z0-9.-]+', '-', config.tokenizer)}"
    tokenizer = choose_tokenizer(config.tokenizer, text)
    text, unknown = tokenizer.replace_unknown(text)
    if unknown:
        print(f"The alphabet of {config.tokenizer} lacks these characters, which become spaces or are left out: {unknown}")
    writer = ShardWriter(out, name, tokenizer, source={"name": config.source, "sha256": sha256(path)})
    cut = int(len(text) * TRAIN_SHARE)
    for split, part in ("val", text[cut:]), ("train", text[:cut]):
        tokens = tokenizer.encode(part)
        if tokenizer.eot is not None:  # a document starts with <|endoftext|>
            tokens.insert(0, tokenizer.eot)
        writer.write(split, tokens, documents=1)
        print(f"{split:5} {len(part):12,} characters {len(tokens):12,} tokens")
    writer.close()
    print(f"{out} is ready: vocabulary of {tokenizer.vocab_size:,}, {len(text):,} characters of {path}")


def choose_tokenizer(name: str, text: str) -> Tokenizer:
    """The tokenizer that --tokenizer names; `char` takes its alphabet from the text."""
    if name == "char":
        return CharTokenizer("".join(sorted(set(text))))
    return load_tokenizer("gpt2") if name == "gpt2" else load_model(name)[1]


def find_text(source: str, text: Path | None) -> Path:
    """The text file that `source` names, downloaded where it has an address and `text` is not given."""
    if text is None and source in NAMED_TEXTS:
        return download(source)
    path = text or Path(source)
    if text and source in NAMED_TEXTS and text.is_file() and sha256(text) != NAMED_TEXTS[source][1]:
        print(f"{text} is not the {source} that others use: losses will not compare.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a text file in it.")
    if not path.exists():
        known = "" if text else f", and no known text (those are {', '.join(NAMED_TEXTS)})"
        raise UserError(f"There is no file {path}{known}.")
    return path


def read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start:,}): convert it first, for instance with iconv.") from None
    if len(text) < 100:  # each split needs a token and the one that follows it
        raise UserError(f"{path} holds {len(text)} characters, too few to learn from; at least 100 are needed.")
    return text


def download(name: str) -> Path:
    """Fetches a named text into data/downloads, checks it, and returns its path; later calls find it there."""
    url, expected = NAMED_TEXTS[name]
    path = DATA / "downloads" / f"{name}.txt"
    if path.exists() and sha256(path) == expected:
        return path
    if url is None:
        raise UserError(f"{name} has no address to download from: give its file with --text FILE.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    try:
        with requests.get(url, stream=True, timeout=30) as response, open(part, "wb") as file:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"{name}.txt") as bar:
                for chunk in response.iter_content(1 << 16):
                    bar.update(file.write(chunk))
    except requests.RequestException as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{url} could not be downloaded ({type(error).__name__}): "
                        "fetch it elsewhere and give it with --text FILE.") from None
    if sha256(part) != expected:
        part.unlink()
        raise UserError(f"{url} did not deliver the expected text (its sha256 differs): try again or use --text FILE.")
    os.replace(part, path)
    return path


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(PrepareConfig))
