"""Text to token ids and back.

    tokenizer = load_tokenizer("gpt2")      # or a folder, or the dict that .to_dict() gave
    tokenizer.decode(tokenizer.encode("Hello, I'm a language model,"))

Three kinds with one interface: `gpt2`, the byte-level BPE of GPT-2 (from assets/gpt2.tiktoken, so no machine downloads
anything), `bpe`, any other byte-level BPE, also one trained here, and `char`, one id a character of a given alphabet.
Merging is left to tiktoken where a BPE is like GPT-2's, else to the `tokenizers` library.
"""
import binascii
import codecs
import functools
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from common.errors import UserError
from common.files import read_json

RANKS = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # sha256 of OpenAI's merges file
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What all kinds share. `vocab_size` ids exist, 0 to vocab_size-1; `eot` is the id of `<|endoftext|>`, or None; a BPE says
    whether it splits text into words as GPT-2 does, and has `vocabulary()` and `merges()` as GPT-2's files spell them."""
    kind: str
    vocab_size: int
    eot: int | None
    splits_as_gpt2: bool
    special: set[int]  # ids that no text gives

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


class BPETokenizer(Tokenizer):
    """Any byte-level BPE, from the text of its tokenizer.json. What its special tokens spell is ordinary text, a lone surrogate
    U+FFFD, and nothing is put before or behind a text. `eot` is the id that ends a text where that is not `<|endoftext|>`."""
    kind = "bpe"
    fast: tiktoken.Encoding | None = None  # gives the same ids, six times as fast, where merges are in the order of their ids

    def __init__(self, description: str, eot: int | None = None):
        parts = json.loads(description)
        model = parts["model"]
        if model["type"] != "BPE" or parts["decoder"]["type"] != "ByteLevel" or (
                model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
            raise ValueError("a tokenizer.json of neither a byte-level BPE nor a table of characters")
        self.description = description
        self.bpe = tokenizers.Tokenizer.from_str(description)
        self.bpe.encode_special_tokens = True
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.bpe.model.dropout = None
        vocab = self.vocabulary()
        self.vocab_size, self.eot = max(vocab.values()) + 1, vocab.get(END_OF_TEXT, eot)
        self.splits_as_gpt2 = splits_as_gpt2(parts)
        added = {token["content"] for token in parts["added_tokens"]}
        self.special = {vocab[token] for token in added}
        self.bytes = {i: token.encode() if token in added else bytes(LETTER_BYTES[letter] for letter in token)
                      for token, i in vocab.items()}
        merged = [vocab.get("".join(pair)) for pair in pairs_of(parts)]
        ranks = {self.bytes[i]: i for i in vocab.values() if i not in self.special}
        if self.splits_as_gpt2 and len(ranks) == 256 + len(merged) and None not in merged and merged == sorted(set(merged)):
            self.fast = tiktoken_bpe(ranks)

    def encode(self, text: str) -> list[int]:
        if self.fast:
            return self.encode_array(text).tolist()
        try:
            return self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError:  # what `tokenizers` says of a lone surrogate
            return self.encode(without_surrogates(text))

    def encode_array(self, text: str) -> np.ndarray:
        if not self.fast:
            return super().encode_array(text)
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_array(without_surrogates(text))
        except ValueError:  # tiktoken gives up on a million blanks in a row
            middle = len(text) // 2
            return np.concatenate([self.encode_array(text[:middle]), self.encode_array(text[middle:])])

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "description": self.description, "eot": self.eot}

    def save(self, folder: Path):
        (folder / "tokenizer.json").write_text(self.description, encoding="utf-8")
        end = self.bpe.id_to_token(self.eot) if self.eot is not None else None
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if end else {}
        save_config(folder, special)

    def vocabulary(self) -> dict[str, int]:
        return self.bpe.get_vocab()

    def merges(self) -> list[tuple[str, str]]:
        return pairs_of(json.loads(self.description))


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own: read from its ranks, saved as its files."""
    kind, vocab_size, eot, splits_as_gpt2, special = "gpt2", 50257, 50256, True, {50256}

    def __init__(self):
        lines = (line.split() for line in RANKS.read_bytes().splitlines())
        self.ranks = {binascii.a2b_base64(token): int(rank) for token, rank in lines}  # a token's rank is its id
        self.fast = tiktoken_bpe(self.ranks)
        self.bytes = {rank: token for token, rank in self.ranks.items()} | {self.eot: END_OF_TEXT.encode()}

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path):
        """GPT-2's own vocab.json and merges.txt, rebuilt from the ranks, and tokenizer.json, which says the same."""
        vocab, merges = self.vocabulary(), self.merges()
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text(merges_file(merges), encoding="utf-8")
        byte_level_bpe(vocab, merges).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}) + "\n")

    def vocabulary(self) -> dict[str, int]:
        """Each token's id, spelled as GPT-2's files do."""
        return {spell(token): rank for token, rank in self.ranks.items()} | {END_OF_TEXT: self.eot}

    def merges(self) -> list[tuple[str, str]]:
        """The pairs that BPE merges, in their order, spelled alike."""
        return [tuple(map(spell, self.merged_from(token))) for token in self.ranks if len(token) > 1]

    def merged_from(self, token: bytes) -> tuple[bytes, bytes]:
        """The two tokens whose merge is this one: what BPE makes of its bytes before the token itself exists."""
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: self.ranks.get(parts[i] + parts[i + 1], self.vocab_size))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return tuple(parts)


def tiktoken_bpe(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The BPE whose ids are the order of its merges, run by tiktoken."""
    return tiktoken.Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-2's kind of tokenizer, of the `tokenizers` library, from a vocabulary and merges as GPT-2's files spell them."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocab else [])
    return bpe


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of `vocab_size` ids, fewer where the texts have no more to merge: GPT-2's way to split, 256 bytes, their
    merges, and `<|endoftext|>` the last. The same texts give the same one."""
    if vocab_size < 257:
        raise UserError(f"A byte-level BPE has at least 257 ids, of the bytes and {END_OF_TEXT}, not {vocab_size}.")
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator(map(without_surrogates, texts), tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(bpe.to_str())


def pairs_of(parts: dict) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json: pairs, or in older files two words each."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in parts["model"]["merges"]]


def merges_file(merges: list[tuple[str, str]]) -> str:
    """The text of GPT-2's merges.txt."""
    return "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"


def splits_as_gpt2(parts: dict) -> bool:
    """Whether a tokenizer.json's byte-level BPE cuts a text into words as GPT-2's does, and merges plainly."""
    words, model = parts["pre_tokenizer"] or {}, parts["model"]
    return (not parts["normalizer"] and words.get("type") == "ByteLevel" and not words["add_prefix_space"]
            and words.get("use_regex", True) and bool(model["merges"]) and not model.get("ignore_merges"))


def without_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it: surrogates that are a pair become their character, as in UTF-16, a lone one U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# GPT-2's files spell a byte as one visible letter: itself where it is one, else the next one free from U+0100 on.
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_INVISIBLE = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_LETTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + n) for n, byte in enumerate(_INVISIBLE)}
LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}


def spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)


class CharTokenizer(Tokenizer):
    """One id a character of `chars`, in their order. What is not among them becomes a space, or nothing without one."""
    kind, eot, splits_as_gpt2, special = "char", None, False, set()

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
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(self.ids, unk_token=self.chars[0]))
        fast.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(self.outside), self.replacement)
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        fast.decoder = tokenizers.decoders.Fuse()
        fast.save(str(folder / "tokenizer.json"))
        save_config(folder, {})


def save_config(folder: Path, special: dict[str, str]):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


gpt2_tokenizer = functools.cache(GPT2Tokenizer)


def load_tokenizer(source: str | Path | dict) -> Tokenizer:
    """The tokenizer named "gpt2", saved in a folder (also as nanoGPT's meta.pkl), or described by the dict of `to_dict`.

    Raises UserError where the source names none that this repository knows, or its files are damaged.
    """
    try:
        if isinstance(source, dict):
            if source.get("kind") == "gpt2":
                return gpt2_tokenizer()
            if source.get("kind") == "char" and isinstance(source.get("chars"), str):
                return CharTokenizer(source["chars"])
            if source.get("kind") == "bpe" and isinstance(source.get("description"), str):
                return BPETokenizer(source["description"], source.get("eot"))
        elif source == "gpt2":
            return gpt2_tokenizer()
        elif isinstance(source, str | Path) and Path(source).is_dir():
            return read_folder(Path(source))
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises bare ones
        what = f"The tokenizer files in {source} are" if not isinstance(source, dict) else "A saved tokenizer is"
        raise UserError(f"{what} damaged ({type(error).__name__}: {error}).") from None
    raise UserError(f"No tokenizer is described by {source!r:.200}: give 'gpt2', a folder or a saved tokenizer's dict.")


def read_folder(folder: Path) -> Tokenizer:
    if (folder / "meta.pkl").exists():
        letters = PlainUnpickler(open(folder / "meta.pkl", "rb")).load()["itos"]
        return CharTokenizer("".join(letters[i] for i in range(len(letters))))
    if (folder / "tokenizer.json").exists():
        return read_description((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (folder / "vocab.json").exists():
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in merges if line and not line.startswith("#version")]
        bpe = byte_level_bpe(read_json(folder / "vocab.json"), pairs)
        added = read_json(folder / "added_tokens.json")  # of older versions of transformers
        bpe.add_special_tokens(sorted(added, key=added.get))
        if any(bpe.token_to_id(token) != i for token, i in added.items()):
            raise ValueError("added_tokens.json does not go on where vocab.json ends")
        return read_description(bpe.to_str())
    raise UserError(f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor meta.pkl.")


def read_description(description: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text: a `char`, GPT-2's own, or another `bpe`."""
    parts = json.loads(description)
    vocab = parts["model"]["vocab"]
    if parts["model"]["type"] == "WordLevel":
        chars = sorted(vocab, key=vocab.get)
        if any(len(char) != 1 or vocab[char] != i for i, char in enumerate(chars)):
            raise ValueError("a tokenizer.json of words, not of characters")
        return CharTokenizer("".join(chars))
    if parts["model"]["type"] == "BPE" and splits_as_gpt2(parts) and vocab == gpt2_tokenizer().vocabulary():
        merges = merges_file(pairs_of(parts)).encode()
        added = {token["content"] for token in parts["added_tokens"]}
        if hashlib.sha256(merges).hexdigest() == GPT2_MERGES and added <= {END_OF_TEXT}:
            return gpt2_tokenizer()
    return BPETokenizer(description)


class PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values alone: whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"a pickle that wants {module}.{name}")
