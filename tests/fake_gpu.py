"""Simulated H100s: programs run on them without a GPU, with shapes and devices but no numbers.

    with Machine() as machine:
        reports = machine.run(scenario, argument, ranks=(0, 7), size=8)

calls `scenario(gpu, world, argument)` as rank 0 and as rank 7 of 8, each in a process of its own,
and returns what each rank allocated, communicated and waited for. The tensors are PyTorch's
FakeTensors, and the collectives those of its fake process group, where every rank can run alone.

An operation on tensors of two devices fails as on a GPU. Memory is counted as the bytes of live
tensors; more than `gpu.memory_bytes` raises torch.OutOfMemoryError. Not simulated: values, speed,
compiled code, NCCL. DDP runs with its reducer in Python, because the one in C++ needs real tensors.
"""
import concurrent.futures
import contextlib
import hashlib
import linecache
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddp

SOURCE = Path(__file__).with_name("fake_gpu.cpp")
ROOT = SOURCE.parents[1]
aten = torch.ops.aten

# operations that copy the shape of their result to the CPU
WAITING = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class HostSync(AssertionError):
    """The CPU waited for the GPU where it must not."""


class Collective(NamedTuple):
    """An operation in which all ranks take part. They hang if one calls another."""
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    bytes: int  # of the largest tensor


class Report(NamedTuple):
    """What a scenario did on one rank."""
    result: Any
    peak_bytes: int
    collectives: list[Collective]
    syncs: list[str]  # our lines that made the CPU wait for the GPU


# --------------------------------------------------------------------------------------------------
# The processes

class Machine:
    """Starts a process with simulated GPUs, which forks one more for each rank of a scenario.

    Raises OSError if this machine cannot simulate GPUs.
    """

    def __enter__(self):
        library = compile_guard()
        context = multiprocessing.get_context("spawn")
        self.server = concurrent.futures.ProcessPoolExecutor(1, context)
        # the library must be loaded before torch, so before the process imports anything
        with mock.patch.dict(os.environ, LD_PRELOAD=str(library), OMP_NUM_THREADS="1"):
            self.server.submit(os.getpid).result()
        return self

    def __exit__(self, *_):
        self.server.shutdown()

    def run(self, scenario: Callable, *arguments, size: int = 1,
            ranks: tuple[int, ...] = (0,)) -> list[Report]:
        return self.server.submit(run_ranks, scenario, arguments, size, ranks).result()


def compile_guard() -> Path:
    """Compiles fake_gpu.cpp, or finds an earlier build."""
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        raise OSError("only PyTorch's CPU build on Linux can simulate GPUs")
    torch_folder = Path(torch.__file__).parent
    inputs = f"{SOURCE.read_text()} {torch.__version__} {torch_folder}"
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"fake-gpu-{os.getuid()}-{digest}.so")
    if library.exists():
        return library
    temporary = library.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run(
            ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", SOURCE,
             "-o", temporary, f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10",
             f"-Wl,-rpath,{torch_folder}/lib"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"g++ cannot compile {SOURCE.name} ({error})") from None
    return temporary.replace(library)


def run_ranks(scenario: Callable, arguments: tuple, size: int, ranks: tuple[int, ...]):
    import torch._dynamo  # noqa: F401, PLC0415 (once, before the forks)
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(len(ranks), context) as forks:
        reports = [forks.submit(run_rank, scenario, arguments, size, rank) for rank in ranks]
        return [report.result() for report in reports]


def run_rank(scenario: Callable, arguments: tuple, size: int, rank: int) -> Report:
    torch.set_num_threads(1)
    world = ddp.World(rank, size, torch.device("cuda", 0))
    gpu = SimulatedGPU(size)
    patch_torch(gpu)
    if size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with gpu.active():
        result = scenario(gpu, world, *arguments)
    return Report(result, gpu.peak_bytes, gpu.collectives, gpu.syncs)


# --------------------------------------------------------------------------------------------------
# The GPU

class SimulatedGPU(TorchDispatchMode):
    """Sees every operation before FakeTensorMode does, and keeps the accounts of the GPU."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size  # number of ranks
        self.memory_bytes = math.inf  # DTensor makes whole tensors to learn the shapes of parts
        self.live_bytes = self.peak_bytes = 0
        self.storages: dict[int, int] = {}  # id of a live storage -> bytes
        self.values: dict[int, list] = {}  # id of a storage -> values, where they are known
        self.collectives: list[Collective] = []
        self.syncs: list[str] = []
        self.may_sync = True
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def active(self):
        """Simulates within a `with` block. Modes belong to a thread, so each needs a block."""
        with self.fakes, self:
            yield

    @contextlib.contextmanager
    def without_syncs(self):
        """Raises HostSync if the CPU waits for the GPU within the block."""
        self.may_sync = False
        try:
            yield
        finally:
            self.may_sync = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # let it call the operations of its local parts
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function.namespace in ("c10d", "_c10d_functional"):
            self.communicate(function, tensors)
        if function is aten._local_scalar_dense.default:
            return self.read_scalar(args[0])

        if function in WAITING:
            self.sync("waits for a shape")

        if function is aten.to.dtype_layout:  # not decomposed in inference mode
            function = aten._to_copy.default
        output = function(*args, **kwargs)

        if function is aten.lift_fresh.default:
            self.remember(output, args[0])
        if function in (aten._to_copy.default, aten.copy_.default):
            source = tensors[-1]
            self.copy_between_devices(source, output, kwargs.get("non_blocking"))
        for tensor in tree_leaves(output):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self.allocate(tensor.untyped_storage())
        return output

    def reset_peak(self):
        self.peak_bytes = self.live_bytes

    def allocate(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = 0
            weakref.finalize(storage, self.free, key)
        self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int):
        self.live_bytes += size - self.storages[key]
        self.storages[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.memory_bytes:
            raise torch.OutOfMemoryError(f"{self.live_bytes / 1e9:.1f} GB on a simulated GPU")

    def free(self, key: int):
        self.live_bytes -= self.storages.pop(key)
        self.values.pop(key, None)

    def communicate(self, function, tensors: list[torch.Tensor]):
        name = function._opname
        if name.startswith("wait"):
            return
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        dtype = tensors[0].dtype if tensors else None
        self.collectives.append(Collective(name, shapes, dtype, largest))
        for tensor in tensors:  # a sum, if all ranks have the values of this one
            key = tensor.untyped_storage()._cdata
            if name.startswith("allreduce") and key in self.values:
                self.values[key] = [value * self.size for value in self.values[key]]

    def read_scalar(self, tensor: torch.Tensor):
        """The value of a tensor with one element, if it is known; else 1.0, 0 or True."""
        if tensor.is_cuda:
            self.sync("reads a number")
        key = tensor.untyped_storage()._cdata
        if key in self.values:
            return self.values[key][tensor.storage_offset()]
        if tensor.dtype.is_floating_point:
            return 1.0
        return tensor.dtype == torch.bool or 0

    def remember(self, output: torch.Tensor, real: torch.Tensor):
        """Remembers the values of torch.tensor(values), which start on the CPU."""
        storage = output.untyped_storage()
        with unset_fake_temporarily():
            self.values[storage._cdata] = real.flatten().tolist()
        weakref.finalize(storage, self.values.pop, storage._cdata, None)

    def copy_between_devices(self, source: torch.Tensor, output: torch.Tensor, non_blocking):
        """Waits, unless memory is pinned; remembers known values that go to the GPU."""
        if source.is_cuda == output.is_cuda:
            return
        is_pinned = getattr(source, "pinned", False)
        if not (output.is_cuda and is_pinned and non_blocking):
            self.sync("copies a tensor")
        values = self.values.get(source.untyped_storage()._cdata)
        if values and output.is_cuda:
            self.values[output.untyped_storage()._cdata] = values

    def sync(self, reason: str):
        frame = sys._getframe()
        while frame and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = reason
        if frame:
            path = frame.f_code.co_filename
            place = f"{Path(path).name}: {linecache.getline(path, frame.f_lineno).strip()}"
        self.syncs.append(place)
        if not self.may_sync:
            raise HostSync(f"The CPU {reason} here: {place}")


def is_ours(path: str) -> bool:
    return path.startswith(str(ROOT)) and path != __file__


# --------------------------------------------------------------------------------------------------
# PyTorch's other parts

def patch_torch(gpu: SimulatedGPU):
    """Replaces what would ask a real GPU. The process cannot undo this."""
    answer_questions_about_the_gpu()
    ignore_streams_and_pinning()
    count_resized_memory(gpu)
    simulate_in_all_threads(gpu)
    keep_device_meshes_real()
    reduce_in_python()
    torch.nn.Module._apply = replace_parameters
    F.scaled_dot_product_attention = attention


def answer_questions_about_the_gpu():
    """torch.cuda describes an H100."""
    FakeTensorMode.avoid_device_init = True
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=80 * 10**9, major=9, minor=0,
        multi_processor_count=132)
    answers = {
        "is_available": True, "device_count": 8, "current_device": 0, "is_bf16_supported": True,
        "get_device_name": properties.name, "get_device_properties": properties,
        "get_device_capability": (9, 0), "mem_get_info": (80 * 10**9, 80 * 10**9),
        "set_device": None, "empty_cache": None, "synchronize": None, "_lazy_init": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def ignore_streams_and_pinning():
    """Streams have nothing to order, numbers that leave PyTorch are 0, pinned memory has a mark."""
    for name in ("Stream", "Event", "current_stream", "default_stream", "stream"):
        setattr(torch.cuda, name, lambda *_, **__: mock.MagicMock())
    torch.Tensor.record_stream = lambda *_: None
    FakeTensor.numpy = lambda tensor: np.zeros(tensor.shape, np.float32)

    def pin_memory(tensor, *_):
        tensor.pinned = True
        return tensor

    torch.Tensor.pin_memory = pin_memory


def count_resized_memory(gpu: SimulatedGPU):
    """FSDP2 frees and allocates memory by resizing it."""
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage, size: int):
        resize(storage, size)
        if storage._cdata in gpu.storages:
            gpu.resize(storage._cdata, size)

    torch.UntypedStorage.resize_ = resize_and_count


def simulate_in_all_threads(gpu: SimulatedGPU):
    """The scheduler has a thread of its own."""
    run_thread = threading.Thread.run

    def run_on_gpu(thread):
        with gpu.active():
            run_thread(thread)

    threading.Thread.run = run_on_gpu


def keep_device_meshes_real():
    """A device mesh holds ranks, not tensors of a GPU."""
    init_device_mesh = device_mesh.init_device_mesh

    def init_real_mesh(*args, **kwargs):
        with unset_fake_temporarily():
            return init_device_mesh(*args, **kwargs)

    device_mesh.init_device_mesh = init_real_mesh


def reduce_in_python():
    """DDP neither compares nor broadcasts parameters, which takes real tensors, and reduces in
    Python, in place. Its reducer in C++ is left out: it would allocate buckets, although DDP on
    GPUs keeps the gradients themselves in them."""
    def all_reduce(gradient, _op, group):
        dist.all_reduce(gradient, group=group)
        return gradient

    for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
        setattr(torch.nn.parallel.distributed, name, lambda *_, **__: None)
    torch.nn.parallel.distributed.fcol = types.SimpleNamespace(all_reduce=all_reduce)
    torch._dynamo.config.optimize_ddp = "python_reducer"
    dist.Reducer = dist.Logger = mock.MagicMock()


def replace_parameters(module: torch.nn.Module, function: Callable, recurse: bool = True):
    """Module._apply with new parameters, because it cannot change FakeTensors in place."""
    for child in module.children():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            with torch.no_grad():
                module._parameters[name] = torch.nn.Parameter(function(p), p.requires_grad)
    return module


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """The kernel that PyTorch chooses on an H100: flash, memory-efficient, or plain products."""
    head_size = q.size(-1)
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if is_half and attn_mask is None and head_size <= 256:
        padding = -head_size % 8
        q, k, v = (F.pad(x, (0, padding)) if padding else x for x in (q, k, v))
        y = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        return y[..., :head_size]
    if head_size % (8 if is_half else 4) == 0:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -1e9)
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal)[0]
