"""What torchrun gives a process: its rank, the world's size, its device; and the sums over all ranks.

    torchrun --standalone --nproc_per_node=8 train.py

Without torchrun the same calls describe a world of one process and cost nothing.
"""
import contextlib
import dataclasses
import hashlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from errors import UserError


@dataclasses.dataclass
class World:
    """The processes of a run: which of `size` this one is, and the device it computes on."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


@contextlib.contextmanager
def join_world(device: str = "auto"):
    """Joins the processes that torchrun started, for the length of a `with`: NCCL on GPUs, gloo elsewhere."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
        if size > 1:
            dist.barrier()  # a process that leaves while another still works can bring both down
    finally:
        if size > 1:
            dist.destroy_process_group()


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" is the first there is of cuda, mps, cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"There is no device {name!r} here; this machine has {there}.")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the device is sold as, "NVIDIA A100-SXM4-80GB" say; of a CPU its kind alone."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wrap(model, world: World):
    """The model whose backward pass averages gradients over all ranks; the model itself in a world of one."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def sum_over_ranks(world: World, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def seed_of(*parts) -> int:
    """A 63-bit seed for the random stream that `parts` name, say (seed, step, rank): near parts, unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
