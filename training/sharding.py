"""Models too large for one device: each rank holds a part of every parameter (FSDP2).

The functions, in the order in which a run calls them:

    shard(model, world, dtype)              divide the model among the ranks
    fill((parameter, values) pairs)         give each rank its part of the values
    write_shards, read_shards               checkpoints: each rank writes and reads its parts
    whole(tensor, world)                    put a tensor together on the main process
    draw_together(model, …)                 sample, with every rank in every forward pass

A sharded parameter is a DTensor, which holds this rank's part and knows how the whole is divided.
An operation that needs the whole parameter, such as a forward pass, is collective: all ranks must
call it.

Some imports are inside functions, as they take a second and only sharded runs need them.
"""
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ddp import World, check_signals
from engine.likelihood import encode
from model import GPT
from tokenizer import Tokenizer
from training.config import TrainConfig

SAMPLE_TOKENS = 200  # in each sample during training

# --------------------------------------------------------------------------------------------------
# Parameters

def shard(model, world: World, dtype: torch.dtype):
    """Divides every parameter of the model among all ranks, in place.

    The forward and backward passes gather the weights of one block at a time, in `dtype`. The
    backward pass averages the gradients over the ranks in float32, and each rank keeps its part of
    the average (FSDP; Zhao et al. 2023, arXiv 2304.11277).
    """
    from torch.distributed import device_mesh, fsdp  # noqa: PLC0415
    mesh = device_mesh.init_device_mesh(world.device.type, (world.size,))
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)  # embeddings and final LayerNorm

    # gather the weights for these methods too, not only for forward
    for name in ("hidden", "logits"):
        fsdp.register_fsdp_forward_method(model, name)


@torch.no_grad()
def fill(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]):
    """Copies values into parameters, given as pairs of a parameter and all of its values.

    For a sharded parameter, each rank copies its part only.
    """
    for p, values in pairs:
        if not hasattr(p, "placements"):  # not a DTensor
            p.copy_(values)
            continue
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415
        # src_data_rank=None: every rank has the values, so none is sent
        part = distribute_tensor(values.to(p.device), p.device_mesh, p.placements,
                                 src_data_rank=None)
        p.copy_(part)


def whole(tensor: torch.Tensor, world: World) -> torch.Tensor | None:
    """Gathers a sharded tensor in the memory of the main process. None on the other ranks."""
    tensor = tensor.full_tensor()
    return tensor.cpu() if world.is_main else None


# --------------------------------------------------------------------------------------------------
# Checkpoints

def named_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames weights to `<parameter name>/weights`, their names in the state of a checkpoint.

    The state also holds the optimizer's tensors, named `<parameter name>/<key>`.
    """
    return {f"{name}/weights": weight for name, weight in weights.items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]):
    """Creates a folder and writes the tensors into it as safetensors, each rank its own parts.

    If one rank fails, raises OSError on all ranks.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise OSError(first_failure(error)) from None


def read_shards(folder: Path, allocate: Callable[[str, torch.Size], torch.Tensor | None]
                ) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint's state, whatever the number of ranks that wrote it.

    `allocate(name, shape)` returns the tensor to read into, or None to skip it. If that tensor is
    sharded, this rank reads its part only. Raises OSError if a file cannot be read.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        tensor = allocate(name, stored.size)
        if tensor is not None:
            tensors[name] = tensor
    with warnings.catch_warnings():
        # a single process reads without a process group, which DCP warns about
        warnings.filterwarnings("ignore", "torch.distributed is")
        try:
            dcp.load(tensors, storage_reader=reader)
        except dcp.api.CheckpointException as error:
            raise OSError(first_failure(error)) from None
    return tensors


def first_failure(error) -> str:
    """The message of the first rank that failed, from DCP's CheckpointException."""
    exception, _ = next(iter(error.failures.values()))
    return str(exception)


# --------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def draw_together(model: GPT, tokenizer: Tokenizer, config: TrainConfig,
                  world: World) -> list[str]:
    """Samples continuations of the sample prompt from a sharded model. All ranks must call it.

    The ranks draw the same tokens, from the same seed, so that all run the same forward passes.
    Sampling uses temperature 0.8, top-k 200 and no KV cache, and draws SAMPLE_TOKENS tokens. Raises
    ddp.Stopped after a signal.
    """
    model.eval()
    device = model.transformer.wte.weight.device
    generator = torch.Generator().manual_seed(config.seed)
    vocab_size = tokenizer.vocab_size  # without the model's padding
    prompt = encode(tokenizer, config.sample_prompt) or [tokenizer.eot or 0]

    ids = torch.tensor([prompt] * config.samples)  # (samples, T)
    for _ in range(SAMPLE_TOKENS):
        check_signals(world)
        context = ids[:, -config.block_size:].to(device)
        last_hidden = model.hidden(context)[:, -1]  # (samples, C)
        logits = model.logits(last_hidden)[:, :vocab_size].float().cpu()
        top_logits, top_ids = logits.topk(min(200, vocab_size))  # (samples, 200) each
        probabilities = (top_logits / 0.8).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)  # (samples, 1)
        ids = torch.cat([ids, top_ids.gather(1, drawn)], dim=1)

    # cut each text off at the end of its document
    texts = []
    for row in ids[:, len(prompt):].tolist():
        end = row.index(tokenizer.eot) if tokenizer.eot in row else len(row)
        texts.append(config.sample_prompt + tokenizer.decode(row[:end]))
    return texts
