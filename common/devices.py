"""What accelerators can do, by their data sheets: for the share of the peak that a run uses, its plan and its energy. And how
many cores there are to use."""
import os
from pathlib import Path
from typing import NamedTuple

CGROUP = Path("/sys/fs/cgroup")


class Device(NamedTuple):
    flops: float  # a second, dense bfloat16 matrix products
    bandwidth: float  # bytes a second, of its memory
    memory_bytes: float
    watts: float  # the most it draws
    link: float  # bytes a second to its neighbours: NVLink one way, or what PCIe 4.0 x16 gives


KG_CO2E_PER_KWH = 0.473  # of the world's electricity in 2024: Ember, Global Electricity Review 2025

# NVIDIA's data sheets: A100 (2021), H100 and H200 (2024, SXM and PCIe), B200 (2024, of an HGX board), L4, L40S, A10G (AWS's G5),
# GeForce RTX 3090 and 4090 (Ampere GA102 and Ada white papers, FP32 accumulate), V100 (float16: it has no bfloat16).
DEVICES = {
    "A100-SXM4-80GB": Device(312e12, 2.039e12, 80e9, 400, 300e9),
    "A100 80GB PCIe": Device(312e12, 1.935e12, 80e9, 300, 25e9),
    "A100": Device(312e12, 1.555e12, 40e9, 400, 300e9),
    "H100 PCIe": Device(756e12, 2.0e12, 80e9, 350, 50e9),
    "H100": Device(989e12, 3.35e12, 80e9, 700, 450e9),
    "H200": Device(989e12, 4.8e12, 141e9, 700, 450e9),
    "B200": Device(2250e12, 8.0e12, 180e9, 1000, 900e9),
    "L40S": Device(362e12, 0.864e12, 48e9, 350, 25e9),
    "L4": Device(121e12, 0.3e12, 24e9, 72, 25e9),
    "A10G": Device(70e12, 0.6e12, 24e9, 300, 25e9),
    "RTX 4090": Device(165e12, 1.008e12, 24e9, 450, 25e9),
    "RTX 3090": Device(71e12, 0.936e12, 24e9, 350, 25e9),
    "V100": Device(125e12, 0.9e12, 32e9, 300, 150e9),
}


def find_device(name: str) -> Device | None:
    """The data sheet of a device as `torch.cuda.get_device_name` or a person calls it; None for one not in the table."""
    def words(text: str) -> str:
        return f" {text.lower().replace('-', ' ')} "
    return next((device for known, device in DEVICES.items() if words(known) in words(name)), None)


def allowed_cores() -> int:
    """Cores that this process may use: those it may run on, and no more than the quota of its cgroup, which is not the host's
    number of cores."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for files in ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]:  # of cgroup v2, of v1
        try:
            quota, period = " ".join((CGROUP / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                cores = min(cores, int(quota) / int(period))
        except OSError:
            continue
    return max(1, round(cores))
