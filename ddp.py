"""What torchrun gives a process: its rank, the world's size, its device; the sums over all ranks; a model on all of them.

    torchrun --standalone --nproc_per_node=8 train.py

Without torchrun the same calls describe a world of one process and cost nothing. A model is whole on every rank (DDP), or each
rank holds a part of every parameter (FSDP2, `shard`).
"""
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable

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


ALONE = World(0, 1, torch.device("cpu"))


@contextlib.contextmanager
def join_world(device: str = "auto", wait_s: float = 600):
    """Joins the processes that torchrun started, for the length of a `with`: NCCL on GPUs, gloo elsewhere.

    No process waits longer than wait_s for another. When one ends before its time or does not answer, gloo raises UserError on
    every rank that is left, and NCCL ends it.
    """
    (rank, size, local_rank), device = torchrun_variables(), pick_device(device)
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"This machine has {torch.cuda.device_count()} GPUs and more processes: lower --nproc_per_node.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    if device.type == "mps":
        raise UserError("Several processes train on GPUs of NVIDIA or on the CPU: give --device cpu.")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=wait_s),
                                store=meeting_point(rank, wait_s), rank=rank, world_size=size)
        yield World(rank, size, device)
        dist.barrier()  # a process that leaves while another still works can bring both down
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|[Cc]onnection|[Tt]imed? ?out", str(error)):
            raise
        raise UserError(f"Process {rank} of {size} lost another, which ended or did not answer within {wait_s:.0f} s: if it does "
                        f"not say why, look at its machine; the same command goes on from the last checkpoint ({error})",
                        every_rank=True) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meeting_point(rank: int, wait_s: float) -> dist.Store:
    """Where the processes of this start find each other: a store that the first of them serves, at the address that it leaves in
    torchrun's. That one itself will not do: torchrun keeps it over restarts, with the addresses of processes that are gone."""
    host, wait = os.environ["MASTER_ADDR"], datetime.timedelta(seconds=wait_s)
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=rank == 0 and not agents, timeout=wait)
    if not agents:
        return store
    if rank == 0:
        served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        store.set("meeting_point", str(served.port))
        return served
    deadline = time.monotonic() + wait_s
    while True:
        try:
            port = int(store.get("meeting_point"))
            socket.create_connection((host, port), timeout=1).close()  # TCPStore alone would wait where nobody listens
            return dist.TCPStore(host, port, is_master=False, timeout=wait)
        except OSError:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"nobody at {host}:{port}") from None
            time.sleep(0.1)


def torchrun_variables() -> tuple[int, int, int]:
    """(rank, world's size, rank on this machine), from the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & given.keys():
        return 0, 1, 0
    numbers = [int(given[name]) if given.get(name, "").isdigit() else -1 for name in names[:3]]
    if len(given) < len(names) or min(numbers) < 0 or numbers[0] >= numbers[1]:
        stated = ", ".join(f"{name}={given.get(name, 'nothing')}" for name in names)
        raise UserError(f"The environment has {stated}: torchrun sets all five, and one process alone needs none.",
                        every_rank=True)
    return tuple(numbers)


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


def memory_bytes(device: torch.device) -> int:
    """What this process may have of the device's memory; those on one machine share its own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory():
    """Has glibc keep what a step frees: the next step asks for as much, and the system would zero every page of it again."""
    with contextlib.suppress(OSError, AttributeError):
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 0)  # M_MMAP_MAX: no block is the system's own
        malloc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: none is given back


def wrap(model, world: World):
    """The model whose backward pass averages gradients over all ranks; the model itself in a world of one, or sharded."""
    if world.size == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


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


def is_sharded(model) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


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


def sum_over_ranks(world: World, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def any_rank(world: World, flag) -> bool:
    """Whether the flag is set on one rank at least."""
    return sum_over_ranks(world, bool(flag))[0] > 0


def seed_of(*parts) -> int:
    """A 63-bit seed for the random stream that `parts` name, say (seed, step, rank): near parts, unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
