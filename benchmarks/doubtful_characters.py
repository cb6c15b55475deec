"""Find the characters that gigatoken and tiktoken classify differently.

    python -m benchmarks.doubtful_characters    # two minutes

Tries every code point between all pairs of neighbors that matter to GPT-2's pattern, and prints
the table DOUBTFUL of corpus/fast_bpe.py (which has the surrogates besides). Run it for a new
version of either library.
"""
import itertools

import numpy as np

from corpus.fast_bpe import BatchEncoder, split
from tokenizer import load_tokenizer

NEIGHBORS = "", "a", "1", ".", " ", "\n", "'s", "'ll"


def main():
    template = "\n".join(f"{left}\0{right}" for left in NEIGHBORS for right in NEIGHBORS)
    tokenizer = load_tokenizer("gpt2")
    encoder = BatchEncoder(tokenizer)
    found = []
    for begin in range(0, 0x110000, 0x1000):
        codes = [code for code in range(begin, begin + 0x1000) if not 0xD800 <= code < 0xE000]
        texts = [template.replace("\0", chr(code)) for code in codes]
        arrays = split(*encoder.encode_with_gigatoken([text.encode() for text in texts]))
        for code, text, ids in zip(codes, texts, arrays):
            if not np.array_equal(ids, tokenizer.encode_array(text)):
                found.append(code)

    # join neighbors into ranges
    for _, group in itertools.groupby(enumerate(found), lambda pair: pair[1] - pair[0]):
        codes = [code for _, code in group]
        print(f"(0x{codes[0]:X}, 0x{codes[-1]:X}),")


if __name__ == "__main__":
    main()
