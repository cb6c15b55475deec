"""Processes and devices: joins the processes that torchrun starts, and lets them communicate.

    torchrun --standalone --nproc_per_node=8 train.py

    with join_world() as world:             # rank, number of processes, device
        model = wrap(model, world)          # averages gradients over all ranks (DDP)
        total = sum_over_ranks(world, value)[0]

The functions are in the order in which a process needs them: it reads torchrun's variables, picks
its device, connects to the other processes and works with them. Without torchrun there is a single
process, and the same calls cost nothing.

With DDP each rank holds the whole model. For models too large for that, see training/sharding.py.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import os
import re
import signal
import socket
import time

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep it alive
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError


@dataclasses.dataclass
class World:
    """This process's place among the processes of a run."""
    rank: int  # 0 to size - 1
    size: int  # number of processes
    device: torch.device  # the device this process computes on
    received_signal: int = 0  # number of the signal that asked this process to stop, or 0
    wrapped: list = dataclasses.field(default_factory=list)  # the models that `wrap` returned

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0


SINGLE_PROCESS = World(0, 1, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# Joining the other processes

@contextlib.contextmanager
def join_world(device: str = "auto", wait_s: float = 600):
    """Joins the processes that torchrun started, and leaves them after the `with` block.

    The backend is NCCL on GPUs and gloo on CPUs. No process waits longer than `wait_s` for another.
    If a process exits early or stops responding, gloo raises UserError on the remaining ranks, and
    NCCL ends them.
    """
    rank, size, local_rank = torchrun_variables()
    device = pick_device(device)

    # give each process on this machine a GPU of its own
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"This machine has {gpus} GPUs, but torchrun started more processes on "
                            "it: lower --nproc_per_node.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)

    if size == 1:
        yield World(rank, size, device)
        return
    if device.type == "mps":
        raise UserError("Several processes can train on NVIDIA GPUs or on the CPU only: add "
                        "--device cpu.")
    end_with_torchrun()
    world = World(rank, size, device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                store=connect_store(rank, wait_s), rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=wait_s))
        yield world
        dist.barrier()  # a process that leaves while another is still working can crash both
    except RuntimeError as error:
        is_network_error = isinstance(error, dist.DistError) or re.search(
            "gloo|[Cc]onnection|[Tt]imed? ?out", str(error))
        if not is_network_error:
            raise
        raise UserError(
            f"Process {rank} of {size} lost contact with another process, which exited or did not "
            f"respond within {wait_s:.0f} s: look for the first error on any machine, then run the "
            f"same command again to resume from the last checkpoint ({error})",
            every_rank=True) from None
    finally:
        # free DDP's references to the group first: if DDP's were the last, Python would free the
        # group without releasing the GIL, and wait forever for a thread of gloo that needs it
        for model in world.wrapped:
            model.reducer = model.logger = model.process_group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def torchrun_variables() -> tuple[int, int, int]:
    """Reads (rank, number of processes, rank on this machine) from the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "(not set)") for name in names]
    if set(values[:3]) == {"(not set)"}:
        return 0, 1, 0  # started without torchrun
    numbers = [int(value) for value in values[:3] if value.isdigit()]
    if len(numbers) == 3 and numbers[0] < numbers[1] and "(not set)" not in values:
        return tuple(numbers)
    listed = ", ".join(f"{name}={value}" for name, value in zip(names, values))
    raise UserError(f"The environment has {listed}, which is incomplete or contradictory: start "
                    "the command with torchrun, or unset all five to use one process.",
                    every_rank=True)


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" is the first available of cuda, mps and cpu."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"This machine has no device {name!r}: choose {' or '.join(available)}.")
    return torch.device(name)


def end_with_torchrun():
    """Makes Linux send SIGTERM to this process if torchrun is killed, and so cannot send it."""
    # CDLL(None) raises TypeError on Windows; macOS has no prctl
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def connect_store(rank: int, wait_s: float) -> dist.Store:
    """Connects to the key-value store through which the processes exchange their addresses.

    torchrun serves such a store at MASTER_ADDR:MASTER_PORT. When it restarts the processes, that
    store still holds the addresses of those that exited. So rank 0 serves a new store at each
    start, and torchrun's store only tells the other ranks its port. Without a store of torchrun,
    rank 0 serves it at MASTER_ADDR:MASTER_PORT.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=wait_s)
    torchrun_store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torchrun_store = dist.TCPStore(host, port, is_master=False, timeout=timeout)

    # rank 0 serves a store; on a free port, which it announces, if torchrun has the other
    if rank == 0:
        store = dist.TCPStore(host, 0 if torchrun_store else port, is_master=True,
                              wait_for_workers=False, timeout=timeout)
        if torchrun_store:
            torchrun_store.set("store_port", str(store.port))
        return store

    # the other ranks connect to it; they retry, as they may first read the port of an earlier start
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if torchrun_store:
                port = int(torchrun_store.get("store_port"))
            # try the port first: for a server that has exited, TCPStore would wait more than twice
            # its timeout
            socket.create_connection((host, port), timeout=1).close()
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)
        except OSError:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"no answer from rank 0 at {host}:{port}") from None
            time.sleep(0.1)


# --------------------------------------------------------------------------------------------------
# Working together

def wrap(model, world: World):
    """Wraps the model so that its backward pass averages gradients over all ranks (DDP).

    Returns the model itself if there is one process, or if the model is sharded.
    """
    if world.size == 1 or is_sharded(model):
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    world.wrapped.append(wrapped)
    return wrapped


def is_sharded(model) -> bool:
    """Whether `training.sharding.shard` has divided the model: FSDP2 adds this method."""
    return hasattr(model, "set_requires_gradient_sync")


def sum_over_ranks(world: World, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64. All ranks must call it."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def any_rank(world: World, flag) -> bool:
    """Whether the flag is true on at least one rank. All ranks must call it."""
    return sum_over_ranks(world, bool(flag))[0] > 0


class Stopped(Exception):
    """Raised on all ranks at the same point, once a signal has asked one of them to stop."""

    def __init__(self, number: int):
        self.number = number  # of the signal


def check_signals(world: World):
    """Raises Stopped if any rank has received a signal. All ranks must call it."""
    terminated, interrupted = sum_over_ranks(
        world, world.received_signal == signal.SIGTERM, world.received_signal == signal.SIGINT)
    if terminated or interrupted:
        raise Stopped(signal.SIGTERM if terminated else signal.SIGINT)


# --------------------------------------------------------------------------------------------------
# The device: precision, name and memory

def auto_dtype(device: torch.device) -> torch.dtype:
    """The precision in which the device multiplies matrices fastest, without a loss in training.

    bfloat16 if the hardware computes it, float16 on older NVIDIA GPUs (T4, V100), else float32.
    This does not use torch.cuda.is_bf16_supported(), which is also True for emulation.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The product name of a GPU, such as "NVIDIA A100-SXM4-80GB"; else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_bytes(device: torch.device) -> int:
    """Memory this process can use: all of its GPU's, or an equal share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not hasattr(os, "sysconf"):  # Windows
        return 8 * 2**30 // processes_here  # a cautious guess
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes_here


def keep_freed_memory():
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    The system zeroes every page it hands out, which is slower than reusing a page. Does nothing on
    systems without glibc.
    """
    # CDLL(None) raises TypeError on Windows; macOS's C library has no mallopt
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate no block with mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return no memory to the system
