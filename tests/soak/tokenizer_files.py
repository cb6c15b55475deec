"""The tokenizers' files that the fuzzer tries: TOKENIZERS, a table at the end.

Each of its functions `prepare(patch)`, with pytest's monkeypatch, writes small valid files into the
current folder. It returns `attempt(source)`, which damages one of them with a random.Random, reads
it as the programs do, and returns the outcome. An attempt raises AssertionError if something wrong
was read without an error. The tables of the other fuzzers are like this one.
"""
import json
import pickle
import random
from pathlib import Path

from conftest import small_bpe
from mutations import PICKLE_SNIPPETS, damaged_json, mutate, mutate_document
from small import CHARS, LETTERS, TEXT, VALID, contents, damaged, replaced

import tokenizer as tokenizer_module
from tokenizer import load_tokenizer

# parts of other tokenizer.json files
PARTS = (
    "BPE", "WordLevel", "Unigram", "WordPiece", "ByteLevel", "Sequence", "Ġ", "Ġt", "a b",
    ["a", "b"],
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"String": "o"}, "content": ""},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Fuse"},
    {"type": "Truncate", "max_length": 0, "stride": 9},
    {"id": 3, "content": "fox", "single_word": True, "lstrip": True, "rstrip": True,
     "normalized": True, "special": True})


def use(tokenizer, source: random.Random) -> str:
    """Reads and writes a text with a tokenizer whose files were damaged."""
    text, _ = tokenizer.replace_unknown(TEXT)
    ids = tokenizer.encode(text)
    tokenizer.decode(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert [array.tolist() for array in tokenizer.encode_batch([text])] == [ids]
    if source.random() < 0.1:
        assert load_tokenizer(tokenizer.to_dict()).encode(text) == ids
    return VALID


def share_tiktoken(patch):
    """Lets equal vocabularies share tiktoken's encoder, which takes longer than all the rest."""
    build, encoders = tokenizer_module.tiktoken_bpe, {}

    def tiktoken_bpe(ranks: dict):
        key = frozenset(ranks.items())
        if key not in encoders:
            if len(encoders) > 100:
                encoders.clear()
            encoders[key] = build(ranks)
        return encoders[key]

    patch.setattr(tokenizer_module, "tiktoken_bpe", tiktoken_bpe)


def bpe_json(patch):
    share_tiktoken(patch)
    return tokenizer_json(json.loads(small_bpe(TEXT, 260).description))


def character_json(_patch):
    CHARS.save(Path())
    return tokenizer_json(json.loads(Path("tokenizer.json").read_bytes()))


def tokenizer_json(document: dict):
    content = json.dumps(document).encode()

    def attempt(source):
        Path("tokenizer.json").write_bytes(damaged_json(content, document, source, PARTS))
        return use(load_tokenizer(Path()), source)
    return attempt


def vocab_and_merges(patch):
    """vocab.json, merges.txt, added_tokens.json, tokenizer_config.json, chat_template.jinja."""
    bpe = small_bpe(TEXT, 260)
    vocab = bpe.vocabulary()
    added = {"<a>": len(vocab), "<b>": len(vocab) + 1}
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages }}"}
    Path("vocab.json").write_text(json.dumps(vocab))
    Path("merges.txt").write_text(tokenizer_module.format_merges(bpe.merges()))
    Path("added_tokens.json").write_text(json.dumps(added))
    Path("tokenizer_config.json").write_text(json.dumps(config))
    Path("chat_template.jinja").write_text("{% for m in messages %}x")
    files = contents(Path())
    share_tiktoken(patch)

    def attempt(source):
        path = source.choice(list(files))
        with replaced(path, damaged(path, files[path], source)):
            return use(load_tokenizer(Path()), source)
    return attempt


def meta_pickle(_patch):
    """nanoGPT's meta.pkl."""
    characters = dict(enumerate(LETTERS))
    document = {"vocab_size": 5, "itos": characters, "stoi": {c: i for i, c in characters.items()}}
    pickles = [pickle.dumps(document, protocol) for protocol in range(6)]

    def attempt(source):
        if source.random() < 0.7:
            content = mutate(source.choice(pickles), source, PICKLE_SNIPPETS)
        else:
            content = pickle.dumps(mutate_document(document, source), source.randrange(6))
        Path("meta.pkl").write_bytes(content)
        return use(load_tokenizer(Path()), source)
    return attempt


TOKENIZERS = {
    "tokenizer.json of a BPE": bpe_json,
    "tokenizer.json of characters": character_json,
    "vocab.json and merges.txt": vocab_and_merges,
    "nanoGPT's meta.pkl": meta_pickle,
}
