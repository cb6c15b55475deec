"""Models that one device does not hold: every rank keeps a part of each parameter (FSDP2)."""
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ddp import World
from engine.likelihood import encode
from model import GPT
from tokenizer import Tokenizer
from training.config import TrainConfig


def shard(model, world: World, bfloat16: bool):
    """Divides every parameter of the model, in place, among all ranks: they gather a block's when it is its turn, in bfloat16
    where asked, and scatter its gradients, summed in float32 (FSDP2; Zhao et al. 2023, arXiv 2304.11277)."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 (these take a second, and few runs need them)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # noqa: PLC0415
    options = {"mesh": init_device_mesh(world.device.type, (world.size,)), "mp_policy": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32)}
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for name in ("hidden", "logits"):  # besides forward
        register_fsdp_forward_method(model, name)


def whole(tensor: torch.Tensor, world: World) -> torch.Tensor | None:
    """A sharded tensor in the main process's memory, all of it; None on the others, which take part."""
    tensor = tensor.full_tensor()
    return tensor.cpu() if world.is_main else None


@torch.no_grad()
def fill(parameters: Iterable[tuple[torch.Tensor, torch.Tensor]]):
    """Gives each of the (parameter, whole values) pairs its values; of a sharded parameter every rank takes its part."""
    for p, values in parameters:
        if not hasattr(p, "placements"):
            p.copy_(values)
            continue
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415
        p.copy_(distribute_tensor(values.to(p.device), p.device_mesh, p.placements, src_data_rank=None))


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]):
    """Each rank its parts of the tensors, as safetensors, in a folder that this makes. Raises OSError on all ranks or none."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 (takes a second, and few runs need it)
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.api.CheckpointException as error:  # on all ranks, whichever failed
        raise OSError(str(next(iter(error.failures.values()))[0])) from None


def read_shards(folder: Path, like: Callable[[str, torch.Size], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tensors of a state's folder, each read into what `like(name, shape)` returns, a rank's part if that is sharded; None
    leaves it out. The number of ranks may be another than wrote them."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {name: like(name, stored.size) for name, stored in reader.read_metadata().state_dict_metadata.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # not initialized, which is as meant
        try:
            dcp.load(tensors, storage_reader=reader)
        except dcp.api.CheckpointException as error:
            raise OSError(str(next(iter(error.failures.values()))[0])) from None
    return tensors


def named_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names that they have in a state, `<parameter>/weights`, beside the optimizer's `<parameter>/<what>`."""
    return {f"{name}/weights": w for name, w in weights.items()}


@torch.no_grad()
def draw_together(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> list[str]:
    """The same of a sharded model, plainly: every rank takes part in each of as many forward passes as there are tokens."""
    model.eval()
    prompt = encode(tokenizer, config.sample_prompt) or [tokenizer.eot or 0]
    ids, generator = torch.tensor([prompt] * config.samples), torch.Generator().manual_seed(config.seed)
    for _ in range(200):
        hidden = model.hidden(ids[:, -config.block_size:].to(model.transformer.wte.weight.device))[:, -1]
        likeliest, choices = model.logits(hidden)[:, :tokenizer.vocab_size].float().cpu().topk(min(200, tokenizer.vocab_size))
        drawn = torch.multinomial((likeliest / 0.8).softmax(-1), 1, generator=generator)  # (samples, 1)
        ids = torch.cat([ids, choices.gather(1, drawn)], dim=1)
    texts = [row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row for row in ids[:, len(prompt):].tolist()]
    return [config.sample_prompt + tokenizer.decode(row) for row in texts]
