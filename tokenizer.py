"""Text to token ids and back.

    tokenizer = load_tokenizer("gpt2")      # or a folder, or the dict that .to_dict() gave
    tokenizer.decode(tokenizer.encode("Hello, I'm a language model,"))

Two kinds with one interface: `gpt2`, the byte-level BPE of GPT-2 (run by tiktoken from assets/gpt2.tiktoken, so
no machine downloads anything), and `char`, one id a character of a given alphabet.
"""
import binascii
import codecs
import functools
import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from errors import UserError
from files import read_json

RANKS = Path(__file__).parent / "assets" / "gpt2.tiktoken"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What both kinds share. `vocab_size` ids exist, 0 to vocab_size-1; `eot` is `<|endoftext|>`'s id or None."""
    kind: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `encode` as an array, without a list on the way where that is faster."""
        return np.array(self.encode(text), dtype=np.uint32)

    def replace_unknown(self, text: str) -> tuple[str, str]:
        """(the text as the vocabulary can spell it, the distinct characters that had to go, in order of appearance)."""
        return text, ""

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 of the ids, possibly cut inside a character. Ids past the vocabulary (a model's padding) are nothing."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self):
        """A function `(ids, final=False) -> str` for ids that arrive one by one: it holds back an unfinished
        character until the bytes that complete it, or `final`, arrive. The pieces join to `decode` of all ids."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids, final=False: utf8.decode(self.decode_bytes(ids), final)

    def to_dict(self) -> dict:
        """What `load_tokenizer` needs to make it again, in plain values."""
        raise NotImplementedError

    def save(self, folder: Path):
        """Writes Hugging Face's files into the folder: `transformers` gets the same ids from them."""
        raise NotImplementedError


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE: any text goes in, `<|endoftext|>` in it as ordinary text, a lone surrogate as U+FFFD."""
    kind, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        lines = (line.split() for line in RANKS.read_bytes().splitlines())
        self.ranks = {binascii.a2b_base64(token): int(rank) for token, rank in lines}  # a token's rank is its id
        self.bpe = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=self.ranks,
                                     special_tokens={END_OF_TEXT: self.eot})

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # UTF-16 joins surrogates that are a pair, which UTF-8 cannot hold
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # tiktoken gives up on a million blanks in a row
            middle = len(text) // 2
            return np.concatenate([self.encode_array(text[:middle]), self.encode_array(text[middle:])])

    def decode_bytes(self, ids) -> bytes:
        return self.bpe.decode_bytes([int(i) for i in ids if 0 <= i < self.vocab_size])

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path):
        """GPT-2's own vocab.json and merges.txt, rebuilt from the ranks."""
        spelled = {token: "".join(BYTE_LETTERS[byte] for byte in token) for token in self.ranks}
        vocab = {spelled[token]: rank for token, rank in self.ranks.items()} | {END_OF_TEXT: self.eot}
        merges = (" ".join(spelled[part] for part in self.merged_from(token)) for token in self.ranks if len(token) > 1)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}) + "\n")

    def merged_from(self, token: bytes) -> tuple[bytes, bytes]:
        """The two tokens whose merge is this one: what BPE makes of its bytes before the token itself exists."""
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: self.ranks.get(parts[i] + parts[i + 1], self.vocab_size))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return tuple(parts)


# GPT-2's files spell a byte as one visible letter: itself where it is one, else the next one free from U+0100 on.
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_INVISIBLE = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_LETTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + n) for n, byte in enumerate(_INVISIBLE)}


class CharTokenizer(Tokenizer):
    """One id a character of `chars`, in their order. What is not among them becomes a space, or nothing without one."""
    kind, eot = "char", None

    def __init__(self, chars: str):
        if len(set(chars)) != len(chars) or not chars:
            raise UserError("A character tokenizer needs an alphabet of distinct characters.")
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.vocab_size = len(chars)
        self.replacement = " " if " " in self.ids else ""
        self.outside = f"[^{re.escape(chars)}]"

    def encode(self, text: str) -> list[int]:
        """Ids of the text; warns once, naming them, of characters that the alphabet lacks."""
        text, unknown = self.replace_unknown(text)
        if unknown:
            became = "became a space" if self.replacement else "were dropped"
            warnings.warn(f"Characters outside the model's alphabet {became}: {unknown!r}", stacklevel=2)
        return [self.ids[c] for c in text]

    def replace_unknown(self, text: str) -> tuple[str, str]:
        unknown = "".join(dict.fromkeys(re.findall(self.outside, text)))
        return re.sub(self.outside, self.replacement, text) if unknown else text, unknown

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.chars[i] for i in ids if 0 <= i < self.vocab_size).encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    def save(self, folder: Path):
        fast = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
            "normalizer": {"type": "Replace", "pattern": {"Regex": self.outside}, "content": self.replacement},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                              "invert": False},
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": self.chars[0]}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


gpt2_tokenizer = functools.cache(GPT2Tokenizer)


def load_tokenizer(source: str | Path | dict) -> Tokenizer:
    """The tokenizer named "gpt2", saved in a folder (also as nanoGPT's meta.pkl), or described by the dict of `to_dict`.

    Raises UserError where the source names none that this repository knows.
    """
    if isinstance(source, dict):
        if source.get("kind") == "gpt2":
            return gpt2_tokenizer()
        if source.get("kind") == "char" and isinstance(source.get("chars"), str):
            return CharTokenizer(source["chars"])
    elif source == "gpt2":
        return gpt2_tokenizer()
    elif isinstance(source, str | Path) and Path(source).is_dir():
        return _load_folder(Path(source))
    raise UserError(f"No tokenizer is described by {source!r:.200}: give 'gpt2', a folder or a saved tokenizer's dict.")


def _load_folder(folder: Path) -> Tokenizer:
    try:
        if (folder / "meta.pkl").exists():
            letters = PlainUnpickler(open(folder / "meta.pkl", "rb")).load()["itos"]
            return CharTokenizer("".join(letters[i] for i in range(len(letters))))
        model = read_json(folder / "tokenizer.json").get("model", {})
        if model.get("type") == "WordLevel":
            return CharTokenizer("".join(sorted(model["vocab"], key=model["vocab"].get)))
        vocab = model.get("vocab") or read_json(folder / "vocab.json")
        if len(vocab) == GPT2Tokenizer.vocab_size and vocab.get(END_OF_TEXT) == GPT2Tokenizer.eot:
            return gpt2_tokenizer()
    except (ValueError, KeyError, AttributeError, TypeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"The tokenizer files in {folder} are damaged ({type(error).__name__}: {error}).") from None
    raise UserError(f"{folder} holds no tokenizer that this repository knows (GPT-2's or a character one).")


class PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values alone: whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"a pickle that wants {module}.{name}")
