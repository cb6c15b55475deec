"""What torchrun gives a process: its rank, the world's size, its device; the sums over all ranks; a model on all of them.

    torchrun --standalone --nproc_per_node=8 train.py

Without torchrun the same calls describe a world of one process and cost nothing. A model is whole on every rank (DDP), or each
rank holds a part of every parameter (FSDP2, `shard`).
"""
import contextlib
import ctypes
import dataclasses
import datetime
import os
import re
import socket
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError


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


SINGLE_PROCESS = World(0, 1, torch.device("cpu"))


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


def is_sharded(model) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


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
