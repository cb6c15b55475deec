import contextlib
import json
import random

import pytest
import tokenizers
from conftest import PROSE, small_bpe
from transformers import AutoTokenizer

from common.errors import UserError
from common.files import sha256
from tokenizer import RANKS, BPETokenizer, CharTokenizer, GPT2Tokenizer, byte_level_bpe, load_tokenizer, train_bpe

TEXTS = ["", "Hello, I'm a language model,", "Я вас любил: любовь ещё, быть может", "🦊👩‍👩‍👧 naïve\r\n\t  end ", "a\0b",
         "before <|endoftext|> after", "   \n\n\n   ", "中文とにほんご"]


SMALL_BPE = small_bpe()


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def test_the_committed_ranks_are_openais():
    assert sha256(RANKS).startswith("306cd27f03c1a714")


def test_gpt2_gives_the_published_ids(gpt2):
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_gives_any_text_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_end_of_text_in_a_text_is_ordinary_text(gpt2):
    assert gpt2.eot not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


def test_a_lone_surrogate_becomes_the_replacement_character(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"
    assert gpt2.decode(gpt2.encode("\ud83e\udd8a")) == "🦊"  # a pair is the character that it spells


def test_ids_past_the_vocabulary_are_nothing(gpt2):
    assert gpt2.decode([15496, *range(50257, 50304), 11, -1]) == "Hello,"
    assert CharTokenizer("ab").decode([0, 2, 50303, -1, 1]) == "ab"


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_holds_back_unfinished_characters(gpt2, text):
    decode, pieces = gpt2.stream_decoder(), []
    for i in gpt2.encode(text):
        pieces.append(decode([i]))
    pieces.append(decode([], final=True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_ends_a_broken_character_with_the_replacement_character(gpt2):
    ids = gpt2.encode("🦊")[:1]
    decode = gpt2.stream_decoder()
    assert decode(ids) == "" and decode([], final=True) == gpt2.decode(ids) == "\ufffd"


def test_char_replaces_what_it_lacks_by_a_space_and_says_so():
    tokenizer = CharTokenizer("\0 abc")
    with pytest.warns(UserWarning, match="became a space: 'жq'"):
        assert tokenizer.decode(tokenizer.encode("aжb\0qqc")) == "a b\0  c"
    assert tokenizer.replace_unknown("aжb\0qqc") == ("a b\0  c", "жq")
    assert tokenizer.encode("") == []


def test_char_drops_what_it_lacks_where_there_is_no_space():
    tokenizer = CharTokenizer("a-c]^\\")  # characters that mean something in a pattern
    with pytest.warns(UserWarning, match="were dropped"):
        assert tokenizer.decode(tokenizer.encode("[a-c]^ b\\\ud800")) == "a-c]^\\"


@pytest.mark.parametrize("tokenizer", [load_tokenizer("gpt2"), SMALL_BPE, CharTokenizer("\n \0\\\"]^-абвabc🦊")],
                         ids=["gpt2", "bpe", "char"])
def test_a_tokenizer_comes_back_from_a_dict_and_from_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for again in load_tokenizer(tokenizer.to_dict()), load_tokenizer(tmp_path):
        assert again.to_dict() == tokenizer.to_dict() and again.encode("abc cab") == tokenizer.encode("abc cab")


def test_transformers_reads_a_saved_char_tokenizer_alike(tmp_path):
    tokenizer = CharTokenizer("\n \0\\\"]^-абвabc🦊")
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab\nc 🦊\\ [жa] -^\"\0" * 3
    ids = tokenizer.encode(tokenizer.replace_unknown(text)[0])
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("source", ["gpt3", {"kind": "char"}, {"kind": "word"}, {}, "/nowhere"])
def test_what_is_no_tokenizer_gets_one_sentence(source):
    with pytest.raises(UserError, match="No tokenizer"):
        load_tokenizer(source)


@pytest.mark.parametrize("content", [
    '{"model": {"type": "WordLevel"', "[" * 100_000, "[]", "{}", '{"model": {"type": "WordLevel", "vocab": {"hi": 0, "yo": 1}}}',
    '{"model": {"type": "WordLevel", "vocab": {"a": 5, "b": 9}}}',
    SMALL_BPE.description.replace('"continuing_subword_prefix":null', '"continuing_subword_prefix":"##"')])
def test_a_tokenizer_file_that_is_damaged_or_of_another_kind_gets_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError):
        load_tokenizer({"kind": "bpe", "description": content})


def test_a_saved_gpt2_tokenizer_is_openais_and_transformers_reads_it_alike(gpt2, tmp_path):
    gpt2.save(tmp_path)
    for name, published in ("vocab.json", "196139668be63f3b"), ("merges.txt", "1ce1664773c50f3e"):
        assert sha256(tmp_path / name).startswith(published)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert text == "before <|endoftext|> after" or theirs(text)["input_ids"] == gpt2.encode(text)


@pytest.mark.parametrize("text", [*TEXTS, "\ud83e\udd8a"])
def test_a_bpe_gives_any_text_back(text):
    ids = SMALL_BPE.encode(text)
    assert SMALL_BPE.eot not in ids and max(ids, default=0) < SMALL_BPE.vocab_size
    assert SMALL_BPE.decode(ids) == ("🦊" if text == "\ud83e\udd8a" else text)


def test_a_bpe_of_gpt2s_own_vocabulary_is_gpt2_in_either_form_of_its_files(gpt2, tmp_path):
    theirs = BPETokenizer(byte_level_bpe(gpt2.vocabulary(), gpt2.merges()).to_str())
    for text in TEXTS:
        assert theirs.encode(text) == gpt2.encode(text)
    theirs.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)
    gpt2.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)


def write_gpt2(gpt2, folder, **changes):
    gpt2.save(folder)
    parts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(parts | changes))


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"added_tokens": [{"id": 50256 + i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": True} for i, content in enumerate(["<|endoftext|>", "<|pad|>"])]}])
def test_what_is_nearly_gpt2s_tokenizer_keeps_its_own_ways(gpt2, tmp_path, changes):
    write_gpt2(gpt2, tmp_path, **changes)
    ours, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.kind == "bpe" and ours.vocab_size == theirs.get_vocab_size()
    assert ours.encode("Hello the Fox") == theirs.encode("Hello the Fox").ids
    assert ours.decode([50256]) == "<|endoftext|>" and ours.decode(range(50257, ours.vocab_size)) in ("", "<|pad|>")


def test_the_older_files_of_a_bpe_are_read_as_they_are(tmp_path):
    """vocab.json and merges.txt with special tokens of its own and none of ours, and added_tokens.json."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROSE], 300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    bpe.save_model(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 300}))
    ours = load_tokenizer(tmp_path)
    assert (ours.kind, ours.vocab_size, ours.eot) == ("bpe", 301, None)
    assert ours.encode("the fox") == bpe.encode("the fox").ids and ours.decode([300]) == "<|user|>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": 400}))
    with pytest.raises(UserError, match="does not go on"):
        load_tokenizer(tmp_path)


def test_transformers_reads_a_saved_bpe_alike(tmp_path):
    SMALL_BPE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == SMALL_BPE.eot
    for text in TEXTS:
        assert "<|endoftext|>" in text or theirs(text)["input_ids"] == SMALL_BPE.encode(text)


def test_a_trained_bpe_gives_any_text_back_and_transformers_reads_it_alike(tmp_path):
    bpe = train_bpe([PROSE, "Я вас любил: любовь ещё, быть может, \ud83e\udd8a"], 330)
    assert (bpe.vocab_size, bpe.eot, bpe.decode([329])) == (330, 329, "<|endoftext|>")
    assert bpe.decode(bpe.encode(" the moon")) == " the moon" and len(bpe.encode(" the moon")) < 4
    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert bpe.decode(bpe.encode(text)) == text and 329 not in bpe.encode(text)
        assert "<|endoftext|>" in text or theirs(text)["input_ids"] == bpe.encode(text)
    assert load_tokenizer(tmp_path).to_dict() == bpe.to_dict() == load_tokenizer(bpe.to_dict()).to_dict()


def test_training_a_bpe_twice_gives_the_same_one_and_it_may_stay_smaller_than_asked():
    assert train_bpe([PROSE], 300).to_dict() == train_bpe(iter([PROSE]), 300).to_dict()
    assert train_bpe([PROSE], 50_000).vocab_size == train_bpe([PROSE], 40_000).vocab_size < 1000
    bytes_alone = train_bpe([], 300)
    assert bytes_alone.vocab_size == 257 and len(bytes_alone.encode("Hi 🦊")) == 7
    with pytest.raises(UserError, match="at least 257"):
        train_bpe([PROSE], 256)


@pytest.mark.parametrize("size", [258, 300, 600])
def test_tiktoken_merges_as_the_tokenizers_library_does(size):
    """Also where pairs overlap, and where a word is a token of itself."""
    rng = random.Random(size)
    pieces = ["a", "aa", "aaa", "ab", "ba", " ", "  ", "\n", "the ", " fox", "'s", "12", "é", "я", "🦊", "<|endoftext|>", "."]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(400)]
    bpe = train_bpe([PROSE, *texts[:200]], size)
    assert bpe.fast
    for text in texts:
        assert bpe.encode(text) == bpe.bpe.encode(text, add_special_tokens=False).ids
    for word in bpe.bytes.values():
        with contextlib.suppress(UnicodeDecodeError):
            assert bpe.encode(word.decode()) == bpe.bpe.encode(word.decode(), add_special_tokens=False).ids


def test_a_bpe_whose_ids_are_not_in_the_order_of_its_merges_is_left_to_the_tokenizers_library():
    parts = json.loads(train_bpe([PROSE], 300).to_dict()["description"])
    vocab, by_id = parts["model"]["vocab"], sorted(parts["model"]["vocab"].items(), key=lambda item: item[1])
    (a, i), (b, j) = by_id[256:258]
    vocab[a], vocab[b] = j, i
    swapped = BPETokenizer(json.dumps(parts))
    assert not swapped.fast and swapped.encode("\ud800 the fox") == swapped.encode("\ufffd the fox")
    assert swapped.decode(swapped.encode(PROSE)) == PROSE
