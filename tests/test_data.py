"""Token shards and the batches read from them."""
import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from corpus.shard_writer import ShardWriter
from dataloader import DataLoader, permute, round_keys
from shards import LLMC_HEADER_BYTES, Shards, verify
from tokenizer import CharTokenizer


@pytest.fixture
def stream(tmp_path):
    """A folder with five train shards of unequal size: 1003 tokens that count up from 0."""
    folder = tmp_path / "stream"
    tokenizer = CharTokenizer("".join(map(chr, range(1003))))
    with ShardWriter(folder, "count", tokenizer, source={}) as writer:
        writer.append(np.arange(50), starts=np.array([0]))
        for part in np.split(np.arange(1003), [1, 100, 600, 990]):
            writer.finish_shard()
            writer.append(part, starts=np.array([0]))
        writer.finish()
    return folder


# --------------------------------------------------------------------------------------------------
# Batches

def test_shards_read_as_one_stream(stream):
    shards = Shards(stream, "train")
    assert len(shards) == 1003
    for start, stop in (0, 1003), (0, 1), (99, 101), (599, 995), (1002, 1003):
        assert shards.read(start, stop).tolist() == list(range(start, stop))


def test_each_epoch_reads_every_sequence_once_in_a_new_order(stream):
    loader = DataLoader(stream, "train", batch_size=10, block_size=10, seed=5)
    assert (loader.sequences, loader.tail) == (100, 2)
    epochs = []
    for first_step in (0, 10):
        steps = range(first_step, first_step + 10)
        epochs.append(np.concatenate([loader.batch(step)[0][:, 0] for step in steps]))
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 1000, 10))
    assert not np.array_equal(*epochs)


def test_targets_are_the_next_tokens(stream):
    x, y = DataLoader(stream, "train", batch_size=7, block_size=10).batch(3)
    assert x.shape == y.shape == (7, 10)
    assert (y == x + 1).all()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_sees_the_tokens_of_one(stream, world):
    whole = DataLoader(stream, "train", batch_size=16, block_size=10, seed=1)
    ranks = [DataLoader(stream, "train", 16, 10, seed=1, rank=rank, world=world)
             for rank in range(world)]
    for step in (0, 6, 100):  # batch 6 crosses the end of the first epoch
        parts = np.concatenate([loader.batch(step)[0] for loader in ranks])
        assert np.array_equal(parts, whole.batch(step)[0])


def test_prefetching_gives_the_same_batches(stream):
    loader = DataLoader(stream, "train", batch_size=7, block_size=10, seed=3)
    prefetched = list(loader.batches(5, 30, torch.device("cpu")))
    assert len(prefetched) == 25
    for step, (x, y) in enumerate(prefetched, 5):
        expected_x, expected_y = loader.batch(step)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert not list(loader.batches(5, 5, torch.device("cpu")))


def test_sequential_order_is_the_order_of_the_text(stream):
    loader = DataLoader(stream, "train", batch_size=8, block_size=10, order="sequential")
    assert loader.batch(0)[0].flatten().tolist() == list(range(80))
    assert loader.batch(12)[0][:, 0].tolist() == [960, 970, 980, 990, 0, 10, 20, 30]


@pytest.fixture
def documents(tmp_path):
    """700 documents of 1 to 40 tokens in three shards, one of which ends inside a document."""
    generator = np.random.default_rng(0)
    texts = [np.append(50_256, generator.integers(0, 9, size)) for size in range(40)]
    tokens = np.concatenate([texts[i] for i in generator.integers(0, 40, 700)])
    for i, part in enumerate(np.split(tokens.astype(np.uint16), [3000, 3001])):
        np.save(tmp_path / f"documents_train_{i:06d}.npy", part)
    return tmp_path


def split_documents(tokens) -> list[tuple]:
    parts = np.split(tokens, np.flatnonzero(tokens == 50_256))
    return [tuple(part.tolist()) for part in parts if len(part)]


def test_document_order_keeps_documents_whole_and_changes_their_neighbors_each_epoch(documents):
    loader = DataLoader(documents, "train", batch_size=4, block_size=16, order="documents", seed=2)
    whole = loader.shards.read(0, len(loader.shards))
    epochs = [loader.stream(epoch).read(0, len(whole)) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(split_documents(epoch)) == sorted(split_documents(whole))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], whole)

    # any part of the new stream is read as in the whole
    for start, stop in (0, 1), (5, 4000), (2999, 3002), (len(whole) - 1, len(whole)):
        assert np.array_equal(loader.stream(1).read(start, stop), epochs[1][start:stop])

    # an epoch has every sequence of its stream once
    steps = range(loader.sequences)  # 4 sequences each: four epochs
    batches = torch.cat([loader.batch(step)[0] for step in steps])
    for epoch in (0, 1):
        rows = batches[epoch * loader.sequences:(epoch + 1) * loader.sequences].tolist()
        cut = epochs[epoch][:loader.sequences * 16].reshape(-1, 16).tolist()
        assert sorted(rows) == sorted(cut)


@pytest.mark.parametrize("world", [2, 8])
def test_document_order_is_the_same_for_any_number_of_ranks(documents, world):
    def loader(**place):
        return DataLoader(documents, "train", 16, 16, seed=1, order="documents", **place)

    last_step = loader().sequences // 16
    for step in (0, last_step, 3 * last_step):  # the second crosses the end of the first epoch
        parts = [loader(rank=rank, world=world).batch(step)[0] for rank in range(world)]
        assert torch.equal(torch.cat(parts), loader().batch(step)[0])


def test_document_order_needs_a_token_between_documents(stream):
    with pytest.raises(UserError, match="needs: use --order shuffled"):
        DataLoader(stream, "train", batch_size=1, block_size=8, order="documents")


def test_a_late_step_reads_only_its_own_sequences(tmp_path, monkeypatch):
    tokens = np.arange(2**16, dtype=np.uint16) % 50_257
    for i in range(100):
        np.save(tmp_path / f"many_train_{i:06d}.npy", tokens)
    starts = []
    read = Shards.read

    def record_and_read(self, start, stop):
        starts.append(start)
        return read(self, start, stop)

    monkeypatch.setattr(Shards, "read", record_and_read)
    x, _ = DataLoader(tmp_path, "train", batch_size=16, block_size=64).batch(15_000)
    assert len(starts) == 16
    assert x.shape == (16, 64)
    assert len({start // 2**16 for start in starts}) > 8  # from many of the 100 shards


# --------------------------------------------------------------------------------------------------
# The permutation

@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_permute_is_a_permutation_for_any_size(n):
    orders = [permute(np.arange(n), n, round_keys(name)[:, None]) for name in "abc"]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 64 or not np.array_equal(orders[0], orders[1])


def test_the_permutation_has_no_visible_pattern():
    order = permute(np.arange(10_000), 10_000, round_keys("x")[:, None])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


# --------------------------------------------------------------------------------------------------
# Shards

def test_shards_of_other_programs_are_read_in_place(tmp_path):
    tokens = np.arange(300, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    assert LLMC_HEADER_BYTES == header.nbytes
    with_header = header.tobytes() + tokens.tobytes()
    for folder, name, content in (
            ("build-nanogpt", "edufineweb_train_000001.npy", None),
            ("llm.c", "fineweb_train_000001.bin", with_header),
            ("stories", "tiny_stories_train.bin", with_header),
            ("nanogpt", "train.bin", tokens.tobytes())):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        np.save(path, tokens) if content is None else path.write_bytes(content)
        assert Shards(tmp_path / folder, "train").read(0, 300).tolist() == tokens.tolist()


def test_llm_c_shards_of_llama_3_hold_32_bits_and_are_not_gpt2s(tmp_path):
    tokens = np.arange(128_000, 128_300, dtype=np.uint32)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, len(tokens)
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())
    assert Shards(tmp_path, "train").read(0, 300).tolist() == tokens.tolist()
    with pytest.raises(UserError, match=r"holds the id 128,.* made with another tokenizer"):
        DataLoader(tmp_path, "train", batch_size=1, block_size=8).batch(0)
    path.write_bytes(header.tobytes() + tokens.tobytes()[:-4])
    with pytest.raises(UserError, match="announces 300 tokens"):
        Shards(tmp_path, "train")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    tokens = np.array([1, 2, 50_257] * 10, dtype=np.uint16)
    np.save(tmp_path / "x_train_000001.npy", tokens)
    with pytest.raises(UserError, match="holds the id 50,257, but its tokenizer has 50,257"):
        DataLoader(tmp_path, "train", batch_size=1, block_size=8).batch(0)
    np.save(tmp_path / "x_val_000000.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"x_train_000001.npy holds the id 50,257"):
        verify(tmp_path)


def test_a_shard_whose_elements_have_no_bytes_is_damaged(tmp_path):
    """numpy would divide by zero and end the process."""
    header = {"descr": "|V0", "fortran_order": False, "shape": (-1,)}
    with open(tmp_path / "x_val_000000.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    with pytest.raises(UserError, match="not a token shard"):
        Shards(tmp_path, "val")


def test_bad_shards_get_one_sentence(stream, tmp_path):
    with pytest.raises(UserError, match="holds no train shards"):
        Shards(tmp_path, "train")
    with pytest.raises(UserError, match="does not divide evenly among 3"):
        DataLoader(stream, "train", batch_size=10, block_size=10, world=3)
    with pytest.raises(UserError, match="fewer than one sequence of 2000"):
        DataLoader(stream, "train", batch_size=1, block_size=2000)
    first, second = sorted(stream.glob("*_train_*.npy"))[1:3]
    np.save(first, np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match="holds 5 tokens but the manifest says 99"):
        Shards(stream, "train")
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        Shards(stream, "train")
    np.save(first, np.arange(99, dtype=np.uint16))
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut off"):
        Shards(stream, "train")
    # numpy runs Python's tokenizer on the header of the file
    second.write_bytes(second.read_bytes().replace(b"}", b" "))
    with pytest.raises(UserError, match="cut off"):
        Shards(stream, "train")
    incomplete = json.loads((stream / "manifest.json").read_text())
    del incomplete["tokens"]
    for damaged in "{}", "[" * 10**5, json.dumps(incomplete):
        (stream / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match="not a manifest"):
            Shards(stream, "train")
