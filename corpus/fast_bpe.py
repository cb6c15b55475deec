"""Encode batches of texts with gigatoken, which is fifteen times as fast as tiktoken.

    encoder = BatchEncoder(load_tokenizer("gpt2"))
    ids, places = encoder.encode_batch([b"a text", b"another"])

The ids are always those of `tokenizer.encode`. A text that gigatoken could split in another way is
left to tiktoken. So is every text if gigatoken is not installed or fails a comparison at the start.
"""
import json

import numpy as np

from tokenizer import RANKS, Tokenizer, code_points

# Characters, as first and last code points, that gigatoken 0.10 and tiktoken 0.14 classify
# differently: the letters and digits that are new in Unicode 17, found by trying every code point
# (python -m benchmarks.doubtful_characters). Surrogates are not encoded at all.
DOUBTFUL = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0xD800, 0xDFFF), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479))
IS_DOUBTFUL = np.zeros(0x110000, dtype=bool)  # for each code point
for first, last in DOUBTFUL:
    IS_DOUBTFUL[first:last + 1] = True

# tiktoken cannot encode a million blanks in a row, and its ids then depend on where it is cut
BLANKS = 2**18
RENEW_BYTES = 10**9  # gigatoken caches every word: replace it after this much text
CHECKED_STRIDE = 61  # the comparison at the start takes every 61st code point
SEPARATOR = b"<|next text|>"  # gigatoken gives it the id after the vocabulary's last
PLACEHOLDER = 0  # the id in front of each text

# for the first two bytes of a character in UTF-8: whether a character in DOUBTFUL starts with them
IS_DOUBTFUL_START = np.zeros((256, 256), dtype=bool)
for code in np.flatnonzero(IS_DOUBTFUL).tolist():
    IS_DOUBTFUL_START[*chr(code).encode("utf-8", "surrogatepass")[:2]] = True


class BatchEncoder:
    """Encodes batches of texts with the ids of `tokenizer.encode`. Threads can share it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.idle = []  # gigatokens and the bytes that each has seen: threads take one each
        self.uses_gigatoken = False
        if getattr(tokenizer, "fast", None):
            problem = self.compare_with_tiktoken()
            self.uses_gigatoken = problem is None
            if problem:
                print(f"{problem}: tiktoken encodes instead, the same ids but far more slowly.")

    def compare_with_tiktoken(self) -> str | None:
        """Encodes a few thousand characters both ways. Returns what is wrong, or None."""
        chars = map(chr, np.flatnonzero(~IS_DOUBTFUL)[:0x32400:CHECKED_STRIDE].tolist())
        texts = [f"It's {char} we'll{char}'re 12{char}\n\n {char}  <|endoftext|>" for char in chars]
        try:
            ours, _ = self.encode_with_gigatoken([text.encode() for text in texts])
        except ImportError:
            return "gigatoken is not installed (pip install gigatoken)"
        except Exception as error:  # a later version may raise anything
            return f"gigatoken failed ({type(error).__name__}: {error})"
        theirs, _ = join(self.tokenizer.encode_batch(texts))
        if not np.array_equal(ours, theirs):
            return "This version of gigatoken gives other ids than tiktoken"
        return None

    def encode_batch(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts given in UTF-8.

        Returns the ids of all texts in one array, and the index of a placeholder before each.
        """
        if not self.uses_gigatoken:
            return join(self.tokenizer.encode_batch(list(map(decode, texts))))
        is_long = any(len(text) >= BLANKS for text in texts)
        if not is_long and not is_doubtful(b"\n".join(texts)):
            return self.encode_with_gigatoken(texts)

        # encode the doubtful texts with tiktoken and the others with gigatoken
        exact = {i: self.tokenizer.encode_array(decode(text)) for i, text in enumerate(texts)
                 if is_doubtful(text) or has_many_blanks(decode(text))}
        ids, places = self.encode_with_gigatoken(
            [b"" if i in exact else text for i, text in enumerate(texts)])
        return join([exact.get(i, array) for i, array in enumerate(split(ids, places))])

    def encode_with_gigatoken(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        import gigatoken  # noqa: PLC0415 (optional)
        try:
            bpe, seen_bytes = self.idle.pop()
        except IndexError:
            bpe, seen_bytes = make_gigatoken(gigatoken.Tokenizer, self.tokenizer), 0

        # encode all texts as one: for a list of texts, gigatoken imports `awkward`, which is slow
        joined = SEPARATOR.join([b"", *texts])
        data = gigatoken.BytesSource(joined)
        ids = bpe.encode_batch_padded(data, pad_id=0, parallel=False)[0].ravel()
        seen_bytes += len(joined)
        if seen_bytes < RENEW_BYTES:
            self.idle.append((bpe, seen_bytes))
        places = np.flatnonzero(ids == self.tokenizer.vocab_size)
        ids[places] = PLACEHOLDER
        return ids, places


def join(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arrays of ids as one, and the index of a placeholder before each."""
    placeholder = np.full(1, PLACEHOLDER, dtype=np.uint32)
    ends = np.cumsum([1 + len(array) for array in arrays], dtype=np.int64)
    ids = [part for array in arrays for part in (placeholder, array)]
    return np.concatenate([placeholder[:0], *ids]), np.concatenate([[0], ends])[:len(arrays)]


def split(ids: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Returns one array for each text, as `join` takes them."""
    return [part[1:] for part in np.split(ids, places)[1:]]


def make_gigatoken(library, tokenizer: Tokenizer):
    """Returns the tokenizer as one of gigatoken's, with SEPARATOR as its only special token."""
    content = SEPARATOR.decode()
    if tokenizer.kind == "gpt2":
        return library.from_tiktoken(RANKS, "gpt2", {content: tokenizer.vocab_size})
    separator = {"id": tokenizer.vocab_size, "content": content, "special": True,
                 "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description = json.loads(tokenizer.description)
    return library.from_json(json.dumps(description | {"added_tokens": [separator]}))


def decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def has_many_blanks(text: str) -> bool:
    return any(text[i:i + BLANKS].isspace() for i in range(0, len(text), BLANKS))


def is_doubtful(text: bytes) -> bool:
    """Whether the text holds characters with which gigatoken's ids may not be tiktoken's."""
    if SEPARATOR in text:
        return True
    if text.isascii():
        return False

    # most texts have no two bytes with which a doubtful character starts
    data = np.frombuffer(text, dtype=np.uint8)
    leads = np.flatnonzero(data >= 0xE0)  # of characters of three or four bytes
    if not IS_DOUBTFUL_START[data[leads], data[leads + 1]].any():
        return False

    # look up the code points of what is not ASCII
    rest = decode(data[data >= 0x80].tobytes())
    return bool(IS_DOUBTFUL[code_points(rest)].any())
