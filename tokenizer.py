"""Tokenizers: text to token ids and back.

    tokenizer = load_tokenizer("gpt2")      # or a folder, or the dict returned by .to_dict()
    tokenizer.decode(tokenizer.encode("Hello, I'm a language model,"))

Three kinds share one interface:
    gpt2    GPT-2's byte-level BPE, read from assets/gpt2.tiktoken (nothing is downloaded)
    bpe     any other byte-level BPE, including one trained here
    char    one id for each character of a given alphabet

A BPE that works like GPT-2's runs on tiktoken, any other on the `tokenizers` library.
"""
import binascii
import codecs
import copy
import functools
import hashlib
import io
import itertools
import json
import pickle
import pickletools
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
# sha256 of OpenAI's merges.txt
GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = "<|endoftext|>"
# the tokenizer_config.json with which `transformers` opens a tokenizer.json
FAST_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


class Tokenizer:
    """The interface that all kinds share."""
    kind: str
    vocab_size: int  # ids are 0 to vocab_size-1
    eot: int | None = None  # the id of <|endoftext|>
    special_ids: frozenset[int] = frozenset()  # ids that `encode` never returns
    splits_like_gpt2: bool = False  # True for a BPE that splits text into words as GPT-2 does
    chat_template: str | None = None  # a Jinja template, as in Hugging Face's tokenizers

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text. Special tokens in the text are encoded as ordinary text."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each text as an array."""
        raise NotImplementedError

    def replace_unknown(self, text: str) -> tuple[str, str]:
        """Replaces the characters that the vocabulary lacks.

        Returns the new text and the distinct characters replaced, in order of appearance.
        """
        return text, ""

    def decode_bytes(self, ids) -> bytes:
        """Returns the UTF-8 bytes of the ids, which may end inside a character.

        Ids outside the vocabulary (a model's padding) give no bytes.
        """
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Returns the text of the ids. Bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self):
        """Returns a function `(ids, final=False) -> str` that decodes ids as they arrive.

        It holds back an incomplete character until its last byte arrives or `final` is True.
        The returned pieces, joined, equal `decode` of all ids.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids, final=False: utf8.decode(self.decode_bytes(ids), final)

    def to_dict(self) -> dict:
        """Returns plain values from which `load_tokenizer` rebuilds the tokenizer.

        They do not include the chat template.
        """
        raise NotImplementedError

    def save(self, folder: Path):
        """Writes Hugging Face's files into the folder; `transformers` reads the same ids."""
        raise NotImplementedError

    def save_config(self, folder: Path, **config):
        """Writes tokenizer_config.json."""
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# Byte-level BPE

class BPETokenizer(Tokenizer):
    """Any byte-level BPE, given the text of its tokenizer.json.

    `encode` treats special tokens as ordinary text, adds no tokens at either end, and replaces a
    lone surrogate by U+FFFD. The argument `eot` is used if the vocabulary lacks `<|endoftext|>`.
    """
    kind = "bpe"
    # six times as fast as `tokenizers`, with the same ids; None if ids do not follow merge order
    fast: tiktoken.Encoding | None = None

    def __init__(self, description: str, eot: int | None = None):
        parts = json.loads(description)
        model = parts["model"]
        byte_level = model["type"] == "BPE" and parts["decoder"]["type"] == "ByteLevel"
        affixes = "continuing_subword_prefix", "end_of_word_suffix"
        if not byte_level or any(map(model.get, affixes)):
            raise ValueError("tokenizer.json is neither a byte-level BPE nor a character table")
        self.description = description

        # switch off everything but the merges
        self.bpe = tokenizers.Tokenizer.from_str(description)
        self.bpe.encode_special_tokens = True
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.bpe.model.dropout = None

        # read the vocabulary
        vocab = self.vocabulary()
        added = {token["content"] for token in parts["added_tokens"]}
        if model.get("unk_token") is not None and model["unk_token"] not in vocab:
            raise ValueError("the unk_token in tokenizer.json is not in its vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        self.eot = vocab.get(END_OF_TEXT, eot)
        self.special_ids = frozenset(vocab[token] for token in added)
        self.token_bytes = {
            i: token.encode() if token in added else bytes(map(UNICODE_TO_BYTE.__getitem__, token))
            for token, i in vocab.items()}

        # use tiktoken if the vocabulary is the 256 bytes and one token per merge, in their order
        self.splits_like_gpt2 = splits_like_gpt2(parts)
        ranks = {self.token_bytes[i]: i for i in vocab.values() if i not in self.special_ids}
        merged = [vocab["".join(pair)] for pair in read_merges(parts)]
        in_order = merged == sorted(set(merged))
        has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
        if self.splits_like_gpt2 and in_order and has_all_bytes and len(ranks) == 256 + len(merged):
            self.fast = tiktoken_bpe(ranks)

    def encode(self, text: str) -> list[int]:
        if self.fast:
            return self.encode_array(text).tolist()
        return self.bpe.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self.fast:
            return [self.encode_array(text) for text in texts]
        texts = [without_surrogates(text) for text in texts]
        encodings = self.bpe.encode_batch_fast(texts, add_special_tokens=False)  # on all cores
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_array(self, text: str) -> np.ndarray:
        """Encodes with tiktoken, as `encode` does."""
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_array(without_surrogates(text))
        except ValueError:  # tiktoken fails on a million spaces in a row
            middle = len(text) // 2
            halves = [self.encode_array(text[:middle]), self.encode_array(text[middle:])]
            return np.concatenate(halves)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.token_bytes.get(int(i), b"") for i in ids)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "description": self.description, "eot": self.eot}

    def save(self, folder: Path):
        (folder / "tokenizer.json").write_text(self.description, encoding="utf-8")
        end = self.bpe.id_to_token(self.eot) if self.eot is not None else None
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) if end else {}
        self.save_config(folder, **FAST_CONFIG, **special)

    def vocabulary(self) -> dict[str, int]:
        """Returns the id of each token, written as in GPT-2's vocab.json."""
        return self.bpe.get_vocab()

    def merges(self) -> list[tuple[str, str]]:
        """Returns the pairs that BPE merges, in order, written as in GPT-2's merges.txt."""
        return read_merges(json.loads(self.description))


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's tokenizer, read from its ranks and saved in the files of OpenAI's release."""
    kind = "gpt2"
    vocab_size = 50257
    eot = 50256
    special_ids = frozenset({50256})
    splits_like_gpt2 = True

    def __init__(self):
        lines = (line.split() for line in RANKS.read_bytes().splitlines())
        # a token's rank is its id
        self.ranks = {binascii.a2b_base64(token): int(rank) for token, rank in lines}
        self.fast = tiktoken_bpe(self.ranks)
        self.token_bytes = {rank: token for token, rank in self.ranks.items()}
        self.token_bytes[self.eot] = END_OF_TEXT.encode()

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path):
        """Writes GPT-2's vocab.json and merges.txt, and the equivalent tokenizer.json."""
        vocab = self.vocabulary()
        merges = self.merges()
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text(format_merges(merges), encoding="utf-8")
        byte_level_bpe(vocab, merges).save(str(folder / "tokenizer.json"))
        self.save_config(folder, tokenizer_class="GPT2Tokenizer")

    def vocabulary(self) -> dict[str, int]:
        vocab = {bytes_to_unicode(token): rank for token, rank in self.ranks.items()}
        return vocab | {END_OF_TEXT: self.eot}

    def merges(self) -> list[tuple[str, str]]:
        pairs = [self.split_token(token) for token in self.ranks if len(token) > 1]
        return [(bytes_to_unicode(left), bytes_to_unicode(right)) for left, right in pairs]

    def split_token(self, token: bytes) -> tuple[bytes, bytes]:
        """Returns the two tokens that BPE merges into this one."""
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            # merge the neighbours whose merge has the lowest rank
            ranks = [self.ranks.get(left + right, self.vocab_size)
                     for left, right in itertools.pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return tuple(parts)


def tiktoken_bpe(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Returns tiktoken's BPE for tokens whose ids follow the order of the merges."""
    # without a special token, tiktoken searches for the empty string: encoding takes twice as long
    special = {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special)


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Returns a BPE of `tokenizers` that splits text and represents bytes as GPT-2 does.

    `vocab` and `merges` are written as in GPT-2's vocab.json and merges.txt.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocab else [])
    return bpe


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE that splits text into words as GPT-2 does.

    Its ids are the 256 bytes, their merges, and `<|endoftext|>` last: `vocab_size` in all, or fewer
    if the texts have no more pairs to merge. Training is deterministic.
    """
    if vocab_size < 257:
        raise UserError("A byte-level BPE needs at least 257 ids (256 bytes and "
                        f"{END_OF_TEXT}), not {vocab_size}.")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator(map(without_surrogates, texts), trainer)
    bpe.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(bpe.to_str())


def read_merges(parts: dict) -> list[tuple[str, str]]:
    """Returns the merges of a parsed tokenizer.json, which older files write as "left right"."""
    merges = parts["model"]["merges"]
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


def format_merges(merges: list[tuple[str, str]]) -> str:
    """Returns the text of GPT-2's merges.txt."""
    return "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"


def splits_like_gpt2(parts: dict) -> bool:
    """Whether a parsed BPE splits text into words as GPT-2 does, and uses its merges."""
    model = parts["model"]
    if parts["normalizer"] or not model.get("merges") or model.get("ignore_merges"):
        return False
    words = parts["pre_tokenizer"] or {}
    return (words.get("type") == "ByteLevel" and not words["add_prefix_space"]
            and words.get("use_regex", True))


def without_surrogates(text: str) -> str:
    """Returns text that UTF-8 can encode: surrogate pairs are joined, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# GPT-2's files write a byte as one visible character: visible Latin-1 characters stand for
# themselves, the other bytes are numbered from U+0100.
BYTE_TO_UNICODE = {byte: chr(byte) for byte in range(256)}
invisible = [byte for byte, char in BYTE_TO_UNICODE.items() if not char.isprintable() or byte == 32]
BYTE_TO_UNICODE |= {byte: chr(256 + n) for n, byte in enumerate(invisible)}
UNICODE_TO_BYTE = {char: byte for byte, char in BYTE_TO_UNICODE.items()}


def bytes_to_unicode(token: bytes) -> str:
    """Returns the token as GPT-2's files write it."""
    return "".join(BYTE_TO_UNICODE[byte] for byte in token)


# --------------------------------------------------------------------------------------------------
# Characters

class CharTokenizer(Tokenizer):
    """One id for each character of `chars`, in order.

    Any other character becomes a space, or is dropped if `chars` has no space.
    """
    kind = "char"

    def __init__(self, chars: str):
        if len(set(chars)) != len(chars) or not chars:
            raise UserError("A character tokenizer needs an alphabet of distinct characters.")
        self.chars = chars
        self.vocab_size = len(chars)
        self.replacement = " " if " " in chars else ""
        self.unknown = re.compile(f"[^{re.escape(chars)}]")

        # the id of each code point, -1 for those that are not in the alphabet
        codes = code_points(chars)
        self.table = np.full(codes.max() + 2, -1, dtype=np.int32)
        self.table[codes] = np.arange(len(chars))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text. Warns if characters are not in the alphabet."""
        text, unknown = self.replace_unknown(text)
        if unknown:
            action = "became a space" if self.replacement else "were dropped"
            warnings.warn(f"Characters outside the model's alphabet {action}: {unknown!r}",
                          stacklevel=2)
        return self.look_up(text).tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.look_up(text) for text in texts]

    def look_up(self, text: str) -> np.ndarray:
        """Returns the id of each character, or -1 if it is not in the alphabet."""
        return self.table[np.minimum(code_points(text), len(self.table) - 1)]

    def replace_unknown(self, text: str) -> tuple[str, str]:
        if (self.look_up(text) >= 0).all():
            return text, ""
        unknown = "".join(dict.fromkeys(self.unknown.findall(text)))
        return self.unknown.sub(self.replacement, text), unknown

    def decode_bytes(self, ids) -> bytes:
        text = "".join(self.chars[i] for i in ids if 0 <= i < self.vocab_size)
        return text.encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    def save(self, folder: Path):
        # express the table as a WordLevel model whose words are single characters
        ids = {char: i for i, char in enumerate(self.chars)}
        model = tokenizers.models.WordLevel(ids, unk_token=self.chars[0])
        fast = tokenizers.Tokenizer(model)
        unknown = tokenizers.Regex(self.unknown.pattern)
        any_char = tokenizers.Regex(r"[\s\S]")
        fast.normalizer = tokenizers.normalizers.Replace(unknown, self.replacement)
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(any_char, "isolated")
        fast.decoder = tokenizers.decoders.Fuse()
        fast.save(str(folder / "tokenizer.json"))
        self.save_config(folder, **FAST_CONFIG)


def code_points(text: str) -> np.ndarray:
    """Returns the code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


# --------------------------------------------------------------------------------------------------
# Loading

gpt2_tokenizer = functools.cache(GPT2Tokenizer)  # one instance, which nobody changes


def load_tokenizer(source: str | Path | dict) -> Tokenizer:
    """Loads a tokenizer.

    `source` is "gpt2", a folder with Hugging Face's tokenizer files or nanoGPT's meta.pkl, or a
    dict returned by `to_dict`. Raises UserError if it is none of these or its files are damaged.
    """
    try:
        match source:
            case "gpt2" | {"kind": "gpt2"}:
                return gpt2_tokenizer()
            case {"kind": "char", "chars": str(chars)}:
                return CharTokenizer(chars)
            case {"kind": "bpe", "description": str(description)}:
                return BPETokenizer(description, source.get("eot"))
            case str() | Path() if Path(source).is_dir():
                return read_folder(Path(source))
    except BaseException as error:
        # `tokenizers` raises bare exceptions, and its panics are not even an Exception
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not (isinstance(error, Exception) or is_panic):
            raise
        place = "a checkpoint or manifest" if isinstance(source, dict) else source
        raise UserError(f"The tokenizer in {place} is damaged ({type(error).__name__}: {error})."
                        ) from None
    raise UserError(f"No tokenizer found for {source!r:.200}: "
                    "give 'gpt2', a folder, or the dict of a saved tokenizer.")


def read_folder(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a folder, and its chat template if it has one."""
    tokenizer = read_vocabulary(folder)
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str) and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        tokenizer = copy.copy(tokenizer)  # GPT-2's instance is shared
        tokenizer.chat_template = template
    return tokenizer


def read_vocabulary(folder: Path) -> Tokenizer:
    """Loads meta.pkl, tokenizer.json, or vocab.json and merges.txt, in this order of preference."""
    if (folder / "meta.pkl").exists():
        chars = unpickle_plain((folder / "meta.pkl").read_bytes())["itos"]
        return CharTokenizer("".join(chars[i] for i in range(len(chars))))
    if (folder / "tokenizer.json").exists():
        return parse_tokenizer_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (folder / "vocab.json").exists():
        paths = str(folder / "vocab.json"), str(folder / "merges.txt")
        vocab, merges = tokenizers.models.BPE.read_file(*paths)
        if max(vocab.values()) > 10 * len(vocab):  # `tokenizers` lists all ids that are missing
            raise ValueError("vocab.json has too few tokens for its largest id")
        bpe = byte_level_bpe(vocab, merges)
        added = read_json(folder / "added_tokens.json")  # older versions of transformers write it
        bpe.add_special_tokens(sorted(added, key=added.get))
        if any(bpe.token_to_id(token) != i for token, i in added.items()):
            raise ValueError("the ids in added_tokens.json do not continue those in vocab.json")
        return parse_tokenizer_json(bpe.to_str())
    raise UserError(f"{folder} has no tokenizer: expected tokenizer.json, vocab.json with "
                    "merges.txt, or meta.pkl.")


def parse_tokenizer_json(description: str) -> Tokenizer:
    """Returns the tokenizer that the text of a tokenizer.json describes."""
    parts = json.loads(description)
    model = parts["model"]
    vocab = model["vocab"]

    # a character table
    if model["type"] == "WordLevel":
        chars = sorted(vocab, key=vocab.get)
        if any(len(char) != 1 or vocab[char] != i for i, char in enumerate(chars)):
            raise ValueError("tokenizer.json is a word table, not a character table")
        return CharTokenizer("".join(chars))

    # GPT-2's own vocabulary and merges
    has_its_size = len(vocab) == GPT2Tokenizer.vocab_size
    if has_its_size and splits_like_gpt2(parts) and vocab == gpt2_tokenizer().vocabulary():
        merges = format_merges(read_merges(parts)).encode()
        added = {token["content"] for token in parts["added_tokens"]}
        if hashlib.sha256(merges).hexdigest() == GPT2_MERGES and added <= {END_OF_TEXT}:
            return gpt2_tokenizer()

    return BPETokenizer(description)


def unpickle_plain(content: bytes):
    """Returns the plain values in a pickle. Raises ValueError if it would take more memory."""
    for opcode, argument, _ in pickletools.genops(content):
        # Python's unpickler reserves memory up to the largest number of a stored value
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"the pickle numbers a value {argument:,}")
    return SafeUnpickler(io.BytesIO(content)).load()


class SafeUnpickler(pickle.Unpickler):
    """Loads plain values only; refuses pickles that name a class or a function."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"the pickle refers to {module}.{name}")
