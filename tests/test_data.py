import json

import numpy as np
import pytest
from conftest import PROSE, tiny_gpt

import prepare
from dataloader import DataLoader, permute
from errors import UserError
from files import sha256
from formats import save_huggingface
from prepare import PrepareConfig
from shards import LLMC_HEADER_BYTES, LLMC_MAGIC, Shards, ShardWriter
from tokenizer import CharTokenizer, load_tokenizer


@pytest.fixture
def stream(tmp_path):
    """A folder of five unequal train shards, 1003 tokens that count up from 0."""
    tokenizer = CharTokenizer("".join(map(chr, range(1003))))
    writer = ShardWriter(tmp_path / "stream", "count", tokenizer, source={})
    writer.write("val", np.arange(50), documents=1)
    for part in np.split(np.arange(1003), [1, 100, 600, 990]):
        writer.write("train", part, documents=1)
    writer.close()
    return tmp_path / "stream"


def test_shards_read_as_one_stream(stream):
    shards = Shards(stream, "train")
    assert len(shards) == 1003
    for start, stop in (0, 1003), (0, 1), (99, 101), (599, 995), (1002, 1003):
        assert shards.read(start, stop).tolist() == list(range(start, stop))


def test_an_epoch_has_every_sequence_once_and_the_next_another_order(stream):
    loader = DataLoader(stream, "train", batch_size=10, block_size=10, seed=5)
    assert (loader.sequences, loader.tail) == (100, 2)
    epochs = [np.concatenate([loader.batch(step)[0][:, 0] for step in range(10 * e, 10 * e + 10)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 1000, 10))
    assert not np.array_equal(*epochs)


def test_targets_are_the_tokens_that_follow(stream):
    x, y = DataLoader(stream, "train", batch_size=7, block_size=10).batch(3)
    assert x.shape == y.shape == (7, 10)
    assert (y == x + 1).all()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_sees_the_tokens_that_one_sees(stream, world):
    whole = DataLoader(stream, "train", batch_size=16, block_size=10, seed=1)
    ranks = [DataLoader(stream, "train", 16, 10, seed=1, rank=rank, world=world) for rank in range(world)]
    for step in (0, 6, 100):  # 6: across the end of the first epoch
        parts = np.concatenate([loader.batch(step)[0] for loader in ranks])
        assert np.array_equal(parts, whole.batch(step)[0])


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_a_permutation_of_any_size_permutes(n):
    orders = [permute(np.arange(n), n, key) for key in "abc"]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or not np.array_equal(orders[0], orders[1])


def test_the_permutation_has_no_visible_pattern():
    order = permute(np.arange(10_000), 10_000, "x")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_other_peoples_shards_are_read_in_place(tmp_path):
    tokens = np.arange(300, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = LLMC_MAGIC, 1, len(tokens)
    for folder, name, content in (("build-nanogpt", "edufineweb_train_000001.npy", None),
                                  ("llm.c", "fineweb_train_000001.bin", header.tobytes() + tokens.tobytes()),
                                  ("nanogpt", "train.bin", tokens.tobytes())):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        np.save(path, tokens) if content is None else path.write_bytes(content)
        assert Shards(tmp_path / folder, "train").read(0, 300).tolist() == tokens.tolist()
    assert LLMC_HEADER_BYTES == header.nbytes


def test_a_text_called_train_keeps_its_splits_apart(tmp_path):
    (tmp_path / "my_train_text.txt").write_text(PROSE)
    prepare.main(PrepareConfig("my_train_text.txt", out=tmp_path / "out"))
    for _ in range(2):
        assert len(Shards(tmp_path / "out", "train")) == int(0.9 * len(PROSE))
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)


def test_bad_shards_get_one_sentence(stream, tmp_path):
    with pytest.raises(UserError, match="holds no train shards"):
        Shards(tmp_path, "train")
    with pytest.raises(UserError, match="does not divide among 3"):
        DataLoader(stream, "train", batch_size=10, block_size=10, world=3)
    with pytest.raises(UserError, match="fewer than one sequence of 2000"):
        DataLoader(stream, "train", batch_size=1, block_size=2000)
    first, second = sorted(stream.glob("*_train_*.npy"))[1:3]
    np.save(first, np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match="holds 5 tokens and the manifest says 99"):
        Shards(stream, "train")
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        Shards(stream, "train")
    np.save(first, np.arange(99, dtype=np.uint16))
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut off"):
        Shards(stream, "train")
    (stream / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        Shards(stream, "train")


def test_a_text_becomes_shards_with_its_last_tenth_for_validation(prose, tmp_path):
    prepare.main(PrepareConfig(str(prose)))
    out = tmp_path / "data" / "prose_char"
    manifest = json.loads((out / "manifest.json").read_text())
    tokenizer = load_tokenizer(manifest["tokenizer"])
    cut = int(len(PROSE) * 0.9)
    for split, part in ("train", PROSE[:cut]), ("val", PROSE[cut:]):
        shards = Shards(out, split)
        assert tokenizer.decode(shards.read(0, len(shards)).tolist()) == part
    assert manifest["format"] == 1 and manifest["source"]["sha256"] == sha256(prose)
    for shard in manifest["shards"]:
        assert sha256(out / shard["file"]) == shard["sha256"]
        assert np.load(out / shard["file"]).shape == (shard["tokens"],)


def test_with_gpt2s_tokenizer_a_document_starts_with_end_of_text(prose, tmp_path):
    prepare.main(PrepareConfig("tiny_pushkin", tokenizer="gpt2", text=prose, out=tmp_path / "poems"))
    for split in "train", "val":
        shards = Shards(tmp_path / "poems", split)
        assert shards.read(0, 1)[0] == 50256
        assert load_tokenizer("gpt2").decode(shards.read(1, len(shards)).tolist()) in PROSE


def test_a_named_text_is_downloaded_and_checked(web, prose, tmp_path, monkeypatch):
    url = web({"/input.txt": prose.read_bytes()})
    monkeypatch.setitem(prepare.NAMED_TEXTS, "tiny_shakespeare", (f"{url}/input.txt", sha256(prose)))
    assert prepare.download("tiny_shakespeare").read_text() == PROSE
    monkeypatch.setitem(prepare.NAMED_TEXTS, "tiny_shakespeare", (f"{url}/elsewhere", sha256(prose)))
    assert prepare.download("tiny_shakespeare").exists()  # the second time it is there already
    monkeypatch.setitem(prepare.NAMED_TEXTS, "other", (f"{url}/input.txt", "0" * 64))
    with pytest.raises(UserError, match="sha256 differs"):
        prepare.download("other")
    monkeypatch.setitem(prepare.NAMED_TEXTS, "lost", (f"{url}/lost.txt", "0" * 64))
    with pytest.raises(UserError, match="could not be downloaded"):
        prepare.download("lost")
    assert [path.name for path in (tmp_path / "data" / "downloads").iterdir()] == ["tiny_shakespeare.txt"]


@pytest.mark.parametrize("content, tokenizer, sentence", [
    (b"", "char", "0 characters, too few"),
    (b"\xff\xfe" * 100, "char", "not UTF-8"),
    (b"abc" * 100, "gpt5", "no file, folder or run"),
    (None, "char", "no file"),
])
def test_bad_texts_get_one_sentence(tmp_path, content, tokenizer, sentence):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare.main(PrepareConfig("text.txt", tokenizer))
    assert not (tmp_path / "data").exists()


def test_a_model_lends_its_tokenizer_and_what_it_lacks_is_named(tmp_path, capsys):
    save_huggingface(tmp_path / "model", tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    (tmp_path / "text.txt").write_text("\ufeff" + "abc é cab\n" * 20, encoding="utf-8")
    prepare.main(PrepareConfig("text.txt", tokenizer=str(tmp_path / "model"), out=tmp_path / "out"))
    assert "left out: é" in capsys.readouterr().out
    assert CharTokenizer("\n abc").decode(Shards(tmp_path / "out", "train").read(0, 10).tolist()) == "abc   cab\n"


def test_preparing_again_replaces_the_shards_but_never_other_files(prose, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        prepare.main(PrepareConfig(str(prose), out=out))
    (out / "thesis_train_000001.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="not shards of prose"):
        prepare.main(PrepareConfig(str(prose), out=out))
    assert len(list(out.iterdir())) == 4 and (out / "thesis_train_000001.npy").read_bytes() == b"mine"


def test_the_command_lines_prepare_and_verify(command, prose, tmp_path):
    assert "prose_char is ready: vocabulary of" in command("prepare.py", prose).stdout
    out = tmp_path / "data" / "prose_char"
    said = command("shards.py", "info", out).stdout
    assert "The fox went out on a chilly night" in said and f"{int(len(PROSE) * 0.9):,} tokens in 1 shards" in said
    assert "2 shards" in command("shards.py", "verify", out).stdout
    shard = next(out.glob("*_train_*.npy"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    done = command("shards.py", "verify", out, check=False)
    assert done.returncode == 2 and f"{shard.name} is damaged" in done.stderr
    done = command("prepare.py", "nothing.txt", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: There is no file nothing.txt")
