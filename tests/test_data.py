
import numpy as np
import pytest
import torch

from common.errors import UserError
from corpus.shard_writer import ShardWriter
from dataloader import DataLoader, permute, round_keys
from shards import LLMC_HEADER_BYTES, LLMC_MAGIC, Shards, verify
from tokenizer import CharTokenizer


@pytest.fixture
def stream(tmp_path):
    """A folder of five unequal train shards, 1003 tokens that count up from 0."""
    tokenizer = CharTokenizer("".join(map(chr, range(1003))))
    with ShardWriter(tmp_path / "stream", "count", tokenizer, source={}) as writer:
        writer.append(np.arange(50), starts=np.array([0]))
        for part in np.split(np.arange(1003), [1, 100, 600, 990]):
            writer.finish_shard()
            writer.append(part, starts=np.array([0]))
        writer.finish()
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


def test_reading_ahead_gives_the_same_batches(stream):
    loader = DataLoader(stream, "train", batch_size=7, block_size=10, seed=3)
    ahead = list(loader.batches(5, 30, torch.device("cpu")))
    assert len(ahead) == 25
    for step, (x, y) in enumerate(ahead, 5):
        assert torch.equal(x, loader.batch(step)[0]) and torch.equal(y, loader.batch(step)[1])
    assert not list(loader.batches(5, 5, torch.device("cpu")))


def test_the_order_of_the_text_on_request(stream):
    loader = DataLoader(stream, "train", batch_size=8, block_size=10, order="sequential")
    assert loader.batch(0)[0].flatten().tolist() == list(range(80))
    assert loader.batch(12)[0][:, 0].tolist() == [960, 970, 980, 990, 0, 10, 20, 30]


def test_a_late_step_of_many_shards_reads_its_own_sequences_alone(tmp_path, monkeypatch):
    tokens = np.arange(2**16, dtype=np.uint16) % 50_257
    for i in range(100):
        np.save(tmp_path / f"many_train_{i:06d}.npy", tokens)
    read = []
    monkeypatch.setattr(Shards, "read", lambda self, *place, read_=Shards.read: (read.append(place), read_(self, *place))[1])
    x, _ = DataLoader(tmp_path, "train", batch_size=16, block_size=64).batch(15_000)
    assert len(read) == 16 and x.shape == (16, 64)
    assert len({place[0] // 2**16 for place in read}) > 8  # from all over the corpus


def test_ids_beyond_the_vocabulary_stop_the_run(tmp_path):
    np.save(tmp_path / "x_train_000001.npy", np.array([1, 2, 50_257] * 10, dtype=np.uint16))
    with pytest.raises(UserError, match="holds the id 50,257, and its tokenizer has 50,257"):
        DataLoader(tmp_path, "train", batch_size=1, block_size=8).batch(0)
    with pytest.raises(UserError, match=r"x_train_000001.npy holds the id 50,257"):
        np.save(tmp_path / "x_val_000000.npy", np.arange(9, dtype=np.uint16))
        verify(tmp_path)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_a_permutation_of_any_size_permutes(n):
    orders = [permute(np.arange(n), n, round_keys(key)[:, None]) for key in "abc"]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or not np.array_equal(orders[0], orders[1])


def test_the_permutation_has_no_visible_pattern():
    order = permute(np.arange(10_000), 10_000, round_keys("x")[:, None])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_other_peoples_shards_are_read_in_place(tmp_path):
    tokens = np.arange(300, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = LLMC_MAGIC, 1, len(tokens)
    for folder, name, content in (("build-nanogpt", "edufineweb_train_000001.npy", None),
                                  ("llm.c", "fineweb_train_000001.bin", header.tobytes() + tokens.tobytes()),
                                  ("stories", "tiny_stories_train.bin", header.tobytes() + tokens.tobytes()),
                                  ("nanogpt", "train.bin", tokens.tobytes())):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        np.save(path, tokens) if content is None else path.write_bytes(content)
        assert Shards(tmp_path / folder, "train").read(0, 300).tolist() == tokens.tolist()
    assert LLMC_HEADER_BYTES == header.nbytes


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


