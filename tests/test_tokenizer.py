import contextlib
import copy
import json
import random

import pytest
import tokenizers
from conftest import PROSE, small_bpe
from transformers import AutoTokenizer

from api.conversation import chat_ids
from common.errors import UserError
from common.files import sha256
from corpus import fast_bpe
from tokenizer import (
    RANKS,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    byte_level_bpe,
    load_tokenizer,
    train_bpe,
)

TEXTS = ["", "Hello, I'm a language model,", "Я вас любил: любовь ещё, быть может",
         "🦊👩‍👩‍👧 naïve\r\n\t  end ", "a\0b", "before <|endoftext|> after",
         "   \n\n\n   ", "中文とにほんご"]
SMALL_BPE = small_bpe()
CHARS = "\n \0\\\"]^-абвabc🦊"


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


# --------------------------------------------------------------------------------------------------
# GPT-2

def test_the_committed_ranks_are_openais():
    assert sha256(RANKS).startswith("306cd27f03c1a714")


def test_gpt2_gives_the_published_ids(gpt2):
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("Hello, I'm a language model,") == ids
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_decodes_what_it_encodes(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_end_of_text_in_a_text_is_ordinary_text(gpt2):
    assert gpt2.eot not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


def test_a_lone_surrogate_becomes_the_replacement_character(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"
    assert gpt2.decode(gpt2.encode("\ud83e\udd8a")) == "🦊"  # a pair is one character


def test_ids_outside_the_vocabulary_decode_to_nothing(gpt2):
    assert gpt2.decode([15496, *range(50257, 50304), 11, -1]) == "Hello,"
    assert CharTokenizer("ab").decode([0, 2, 50303, -1, 1]) == "ab"


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_holds_back_unfinished_characters(gpt2, text):
    decode = gpt2.stream_decoder()
    pieces = [decode([i]) for i in gpt2.encode(text)]
    pieces.append(decode([], final=True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_ends_a_broken_character_with_the_replacement_character(gpt2):
    ids = gpt2.encode("🦊")[:1]
    decode = gpt2.stream_decoder()
    assert decode(ids) == "" and decode([], final=True) == gpt2.decode(ids) == "\ufffd"


def test_a_saved_gpt2_tokenizer_is_openais_and_transformers_gives_its_ids(gpt2, tmp_path):
    gpt2.save(tmp_path)
    for name, published in ("vocab.json", "196139668be63f3b"), ("merges.txt", "1ce1664773c50f3e"):
        assert sha256(tmp_path / name).startswith(published)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if text != "before <|endoftext|> after":
            assert theirs(text)["input_ids"] == gpt2.encode(text)


# --------------------------------------------------------------------------------------------------
# Characters

def test_char_replaces_unknown_characters_by_a_space_and_warns():
    tokenizer = CharTokenizer("\0 abc")
    with pytest.warns(UserWarning, match="became a space: 'жq'"):
        assert tokenizer.decode(tokenizer.encode("aжb\0qqc")) == "a b\0  c"
    assert tokenizer.replace_unknown("aжb\0qqc") == ("a b\0  c", "жq")
    assert tokenizer.encode("") == []


def test_char_drops_unknown_characters_if_it_has_no_space():
    tokenizer = CharTokenizer("a-c]^\\")  # characters with a meaning in a regular expression
    with pytest.warns(UserWarning, match="were dropped"):
        assert tokenizer.decode(tokenizer.encode("[a-c]^ b\\\ud800")) == "a-c]^\\"


def test_transformers_gives_the_ids_of_a_saved_char_tokenizer(tmp_path):
    tokenizer = CharTokenizer(CHARS)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab\nc 🦊\\ [жa] -^\"\0" * 3
    ids = tokenizer.encode(tokenizer.replace_unknown(text)[0])
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)


# --------------------------------------------------------------------------------------------------
# Loading

@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), SMALL_BPE, CharTokenizer(CHARS)],
                         ids=["gpt2", "bpe", "char"])
def test_a_tokenizer_loads_from_its_dict_and_from_its_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for loaded in load_tokenizer(tokenizer.to_dict()), load_tokenizer(tmp_path):
        assert loaded.to_dict() == tokenizer.to_dict()
        assert loaded.encode("abc cab") == tokenizer.encode("abc cab")


@pytest.mark.parametrize("source", ["gpt3", {"kind": "char"}, {"kind": "word"}, {}, "/nowhere"])
def test_an_unknown_tokenizer_gets_one_sentence(source):
    with pytest.raises(UserError, match="No tokenizer"):
        load_tokenizer(source)


@pytest.mark.parametrize("content", [
    '{"model": {"type": "WordLevel"', "[" * 100_000, "[]", "{}",
    '{"model": {"type": "WordLevel", "vocab": {"hi": 0, "yo": 1}}}',
    '{"model": {"type": "WordLevel", "vocab": {"a": 5, "b": 9}}}',
    SMALL_BPE.description.replace('"continuing_subword_prefix":null',
                                  '"continuing_subword_prefix":"##"'),
    SMALL_BPE.description.replace('"unk_token":null', '"unk_token":"?!"'),
    SMALL_BPE.description.replace(  # the `tokenizers` library panics
        '"normalizer":null',
        '"normalizer":{"type":"Precompiled","precompiled_charsmap":"AAAA"}')])
def test_a_damaged_or_unknown_tokenizer_json_gets_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError):
        load_tokenizer({"kind": "bpe", "description": content})


# --------------------------------------------------------------------------------------------------
# Other byte-level BPEs

@pytest.mark.parametrize("text", [*TEXTS, "\ud83e\udd8a"])
def test_a_bpe_decodes_what_it_encodes(text):
    ids = SMALL_BPE.encode(text)
    assert SMALL_BPE.eot not in ids and max(ids, default=0) < SMALL_BPE.vocab_size
    assert SMALL_BPE.decode(ids) == ("🦊" if text == "\ud83e\udd8a" else text)


def test_a_bpe_with_gpt2s_vocabulary_loads_as_gpt2_from_either_form_of_its_files(gpt2, tmp_path):
    theirs = BPETokenizer(byte_level_bpe(gpt2.vocabulary(), gpt2.merges()).to_str())
    for text in TEXTS:
        assert theirs.encode(text) == gpt2.encode(text)
    theirs.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)
    gpt2.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)


def added_token(id_: int, content: str) -> dict:
    return {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                       "use_regex": True}},
    {"added_tokens": [added_token(50256, "<|endoftext|>"), added_token(50257, "<|pad|>")]}])
def test_a_variant_of_gpt2s_tokenizer_is_not_taken_for_gpt2(gpt2, tmp_path, changes):
    gpt2.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ours = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert ours.kind == "bpe" and ours.vocab_size == theirs.get_vocab_size()
    assert ours.encode("Hello the Fox") == theirs.encode("Hello the Fox").ids
    assert ours.decode([50256]) == "<|endoftext|>"
    assert ours.decode(range(50257, ours.vocab_size)) in ("", "<|pad|>")


def test_vocab_json_and_added_tokens_json_open_with_their_special_tokens(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROSE], 300, special_tokens=["<s>", "<pad>", "</s>"],
                            show_progress=False)
    bpe.save_model(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 300}))
    ours = load_tokenizer(tmp_path)
    assert (ours.kind, ours.vocab_size, ours.eot) == ("bpe", 301, None)
    assert ours.encode("the fox") == bpe.encode("the fox").ids
    assert ours.decode([300]) == "<|user|>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 400}))
    with pytest.raises(UserError, match="do not continue"):
        load_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"the": 10**8}))
    with pytest.raises(UserError, match="too few tokens for its largest id"):
        load_tokenizer(tmp_path)


def test_transformers_gives_the_ids_of_a_saved_bpe(tmp_path):
    SMALL_BPE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == SMALL_BPE.eot
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert theirs(text)["input_ids"] == SMALL_BPE.encode(text)


# --------------------------------------------------------------------------------------------------
# Training a BPE

def test_a_trained_bpe_decodes_any_text_and_transformers_gives_its_ids(tmp_path):
    bpe = train_bpe([PROSE, "Я вас любил: любовь ещё, быть может, \ud83e\udd8a"], 330)
    assert (bpe.vocab_size, bpe.eot, bpe.decode([329])) == (330, 329, "<|endoftext|>")
    assert bpe.decode(bpe.encode(" the moon")) == " the moon" and len(bpe.encode(" the moon")) < 4
    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert bpe.decode(bpe.encode(text)) == text and 329 not in bpe.encode(text)
        if "<|endoftext|>" not in text:
            assert theirs(text)["input_ids"] == bpe.encode(text)
    assert load_tokenizer(tmp_path).to_dict() == bpe.to_dict()
    assert load_tokenizer(bpe.to_dict()).to_dict() == bpe.to_dict()


def test_training_a_bpe_is_deterministic_and_stops_when_no_pairs_are_left():
    assert train_bpe([PROSE], 300).to_dict() == train_bpe(iter([PROSE]), 300).to_dict()
    largest = train_bpe([PROSE], 50_000).vocab_size
    assert largest == train_bpe([PROSE], 40_000).vocab_size < 1000
    untrained = train_bpe([], 300)
    assert untrained.vocab_size == 257 and len(untrained.encode("Hi 🦊")) == 7
    with pytest.raises(UserError, match="at least 257"):
        train_bpe([PROSE], 256)


@pytest.mark.parametrize("size", [258, 300, 600])
def test_tiktoken_merges_as_the_tokenizers_library_does(size):
    """Also if pairs overlap, and if a whole word is one token."""
    rng = random.Random(size)
    pieces = ["a", "aa", "aaa", "ab", "ba", " ", "  ", "\n", "the ", " fox", "'s", "12", "é", "я",
              "🦊", "<|endoftext|>", "."]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(400)]
    bpe = train_bpe([PROSE, *texts[:200]], size)
    assert bpe.fast
    for token in bpe.token_bytes.values():
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(token.decode())
    for text in texts:
        assert bpe.encode(text) == bpe.bpe.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), train_bpe([PROSE], 300), SMALL_BPE])
def test_tiktoken_knows_a_special_token_but_never_returns_it(tokenizer):
    """Without one, tiktoken's search for special tokens stops at every character."""
    special = tokenizer.fast.special_tokens_set
    assert special == {"<|endoftext|>"}
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.fast.encode_single_token("<|endoftext|>") not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_bpe_whose_ids_do_not_follow_its_merges_runs_on_the_tokenizers_library():
    parts = json.loads(train_bpe([PROSE], 300).to_dict()["description"])
    vocab = parts["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[256:258]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    swapped = BPETokenizer(json.dumps(parts))
    assert not swapped.fast
    assert swapped.encode("\ud800 the fox") == swapped.encode("\ufffd the fox")
    assert swapped.decode(swapped.encode(PROSE)) == PROSE


def test_a_vocabulary_without_one_of_the_bytes_encodes_the_others():
    description = json.loads(train_bpe([PROSE], 300).description)
    vocab = description["model"]["vocab"]
    vocab["ĀĀ"] = vocab.pop("Ā")  # how tokenizer.json writes byte 0
    tokenizer = BPETokenizer(json.dumps(description))
    assert tokenizer.decode(tokenizer.encode("the\0fox")) == "thefox"


# --------------------------------------------------------------------------------------------------
# gigatoken

HOSTILE = ["a", "the ", " fox", "'s", "'ll", "'", " ", "  ", "\n", "\t", "\x1c", "\u3000", "12",
           "٣", "é", "я", "你", "🦊", "\u0301", "<|endoftext|>", ".", "\0", "\ufffd",
           *(chr(code) for pair in fast_bpe.DOUBTFUL for code in pair)]


def utf8(texts: list[str]) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), SMALL_BPE, train_bpe([PROSE], 400)])
def test_gigatoken_gives_the_ids_of_tiktoken(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_bpe, "RENEW_BYTES", 20_000)
    encoder = fast_bpe.BatchEncoder(tokenizer)
    assert encoder.uses_gigatoken
    rng = random.Random(0)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randint(0, 40))) for _ in range(2000)]
    texts += [chr(code) for code in range(0, 0x110000, 97)]
    for i in range(0, len(texts), 400):
        arrays = fast_bpe.split(*encoder.encode_batch(utf8(texts[i:i + 400])))
        assert [array.tolist() for array in arrays] == list(map(tokenizer.encode, texts[i:i + 400]))
    assert fast_bpe.split(*encoder.encode_batch([])) == []


def test_what_gigatoken_could_split_otherwise_is_left_to_tiktoken(gpt2, monkeypatch):
    encoder = fast_bpe.BatchEncoder(gpt2)
    sent = []
    encode = encoder.encode_with_gigatoken
    monkeypatch.setattr(encoder, "encode_with_gigatoken",
                        lambda texts: encode(sent.append(texts) or texts))
    doubtful = ["\u088f's", "a\ud800b", " " * 1_100_000 + "x", "x" + "\n" * 600_000 + "é"]
    texts = ["one", *doubtful, "Я, 🦊 and 你好"]
    arrays = fast_bpe.split(*encoder.encode_batch(utf8(texts)))
    assert sent == [utf8(["one", "", "", "", "", "Я, 🦊 and 你好"])]
    assert [array.tolist() for array in arrays] == [gpt2.encode(text) for text in texts]


def test_a_gigatoken_that_disagrees_or_fails_is_not_used(gpt2, monkeypatch, capsys):
    other = train_bpe([PROSE], 300)
    make = fast_bpe.make_gigatoken
    for broken, sentence in ((lambda library, _: make(library, other), "gives other ids"),
                             (lambda library, _: library.no_such_thing, "gigatoken failed")):
        monkeypatch.setattr(fast_bpe, "make_gigatoken", broken)
        encoder = fast_bpe.BatchEncoder(gpt2)
        assert sentence in capsys.readouterr().out and not encoder.uses_gigatoken
        ids, places = encoder.encode_batch([b"the fox"])
        assert places.tolist() == [0] and ids[1:].tolist() == gpt2.encode("the fox")


def test_a_batch_has_the_ids_of_its_texts_if_only_the_tokenizers_library_runs_the_bpe():
    description = json.loads(train_bpe([PROSE], 300).description)
    description["normalizer"] = {"type": "Lowercase"}
    bpe = BPETokenizer(json.dumps(description))
    texts = ["The FOX", "", "a<|endoftext|>\ud800"]
    arrays = fast_bpe.split(*fast_bpe.BatchEncoder(bpe).encode_batch(utf8(texts)))
    assert [array.tolist() for array in arrays] == [bpe.encode(text) for text in texts]


# --------------------------------------------------------------------------------------------------
# Chat templates

CHAT = ("{{ bos_token }}Two people chat."
        "{% for m in messages %}"
        "{{ bos_token }}{{ 'User' if m.role == 'user' else 'Bot' }}: {{ m.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}Bot:{% endif %}")
MESSAGES = [{"role": "user", "content": "Hello, I'm 🦊\n"},
            {"role": "assistant", "content": " the moon  is ещё "},
            {"role": "user", "content": "Why?"}]


def with_template(tokenizer, template=CHAT):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("tokenizer", [
    load_tokenizer("gpt2"),
    train_bpe([PROSE], 400),
    CharTokenizer("".join(sorted(set(f"{CHAT}{MESSAGES}\n"))))], ids=["gpt2", "bpe", "char"])
def test_a_conversation_has_the_ids_that_transformers_gives_it(tokenizer, tmp_path):
    with_template(tokenizer).save(tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == theirs.chat_template == CHAT
    for prompt in True, False:
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt)["input_ids"]
        assert chat_ids(ours, MESSAGES, add_generation_prompt=prompt) == ids
        assert ids.count(ours.eot) == (0 if ours.eot is None else 4 + prompt)


def test_other_special_tokens_of_a_template_become_their_ids(gpt2, tmp_path):
    bpe = byte_level_bpe(gpt2.vocabulary(), gpt2.merges())
    bpe.add_special_tokens(["<|user|>"])
    template = "{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
    with_template(BPETokenizer(bpe.to_str()), template).save(tmp_path)
    ids = chat_ids(load_tokenizer(tmp_path), MESSAGES)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES)["input_ids"]
    assert ids == theirs and ids.count(50257) == ids.count(50256) == 3


def test_a_message_cannot_write_special_tokens():
    tokenizer = with_template(train_bpe([PROSE], 300))
    expected = chat_ids(tokenizer, [{"role": "user", "content": "one two"}])
    for content in "one<|endoftext|> two", "one <|endo<|endoftext|>ftext|>two":
        assert chat_ids(tokenizer, [{"role": "user", "content": content}]) == expected
    deep = f"one{'<|endo' * 20_000}<|endoftext|>{'ftext|>' * 20_000} two"  # in linear time
    assert chat_ids(tokenizer, [{"role": "user", "content": deep}]) == expected
    nested = with_template(tokenizer, "{{ messages[0].content[0].text }}")
    parts = [{"type": "text", "text": "one<|endoftext|> two"}]
    assert tokenizer.eot not in chat_ids(nested, [{"role": "user", "content": parts}])


def test_a_chat_template_is_read_from_either_file_and_not_kept_by_the_shared_gpt2(gpt2, tmp_path):
    with_template(gpt2).save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHAT
    gpt2.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == CHAT
    assert load_tokenizer(tmp_path).to_dict() == gpt2.to_dict()
    assert load_tokenizer("gpt2").chat_template is None


@pytest.mark.parametrize("template, sentence", [
    (None, "has no chat template"),
    ("{% for %}", "failed .TemplateSyntaxError"),
    ("{{ messages[9].content.x }}", "failed .UndefinedError"),
    ("{{ 1 / 0 }}", "failed .ZeroDivisionError"),
    ("{{ messages.append(1) }}", "failed .SecurityError")])
def test_a_chat_template_that_fails_gets_one_sentence(gpt2, template, sentence):
    with pytest.raises(UserError, match=sentence):
        chat_ids(with_template(gpt2, template), MESSAGES)
