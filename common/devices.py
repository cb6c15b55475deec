"""Holds data-sheet figures of accelerators, and counts the CPU cores that a process may use."""
import os
from pathlib import Path
from typing import NamedTuple

CGROUP = Path("/sys/fs/cgroup")
KG_CO2E_PER_KWH = 0.473  # world average in 2024: Ember, Global Electricity Review 2025


class Device(NamedTuple):
    flops: float  # peak FLOPs per second of dense bfloat16 matrix products, summed in float32
    bandwidth: float  # memory bandwidth, bytes per second
    memory_bytes: float
    watts: float  # maximum power
    link: float  # bytes per second to other devices, one way: NVLink, Infinity Fabric or PCIe x16


# From the makers' data sheets: A100 (2021), H100 and H200 (2024, SXM and PCIe), GH200 (96 GB), B200
# (2024, on an HGX board), A10, A10G (AWS G5), L4, L40S, RTX 6000 Ada, MI300X; T4 and V100 (float16,
# as they have no bfloat16). GeForce: white papers of Ampere GA102, Ada and RTX Blackwell. RTX PRO
# 6000: an eighth of the sheet's FP4 figure, which counts sparsity. The first matching name counts.
DEVICES = {
    "A100-SXM4-80GB": Device(312e12, 2.039e12, 80e9, 400, 300e9),
    "A100 80GB PCIe": Device(312e12, 1.935e12, 80e9, 300, 25e9),
    "A100": Device(312e12, 1.555e12, 40e9, 400, 300e9),
    "H100 PCIe": Device(756e12, 2.0e12, 80e9, 350, 50e9),
    "H100": Device(989e12, 3.35e12, 80e9, 700, 450e9),
    "H200": Device(989e12, 4.8e12, 141e9, 700, 450e9),
    "GH200": Device(989e12, 4.0e12, 96e9, 1000, 450e9),
    "B200": Device(2250e12, 8.0e12, 180e9, 1000, 900e9),
    "L40S": Device(362e12, 0.864e12, 48e9, 350, 25e9),
    "L4": Device(121e12, 0.3e12, 24e9, 72, 25e9),
    "A10": Device(125e12, 0.6e12, 24e9, 150, 25e9),
    "A10G": Device(70e12, 0.6e12, 24e9, 300, 25e9),
    "RTX PRO 6000 Blackwell Max-Q": Device(439e12, 1.792e12, 96e9, 300, 50e9),
    "RTX PRO 6000 Blackwell Server": Device(500e12, 1.597e12, 96e9, 600, 50e9),
    "RTX PRO 6000": Device(500e12, 1.792e12, 96e9, 600, 50e9),
    "RTX 6000 Ada": Device(364e12, 0.96e12, 48e9, 300, 25e9),
    "RTX 5090": Device(209.5e12, 1.792e12, 32e9, 575, 50e9),
    "RTX 5080": Device(112.6e12, 0.96e12, 16e9, 360, 50e9),
    "RTX 5070 Ti": Device(87.9e12, 0.896e12, 16e9, 300, 50e9),
    "RTX 5070": Device(61.7e12, 0.672e12, 12e9, 250, 50e9),
    "RTX 4090": Device(165e12, 1.008e12, 24e9, 450, 25e9),
    "RTX 3090": Device(71e12, 0.936e12, 24e9, 350, 25e9),
    "V100": Device(125e12, 0.9e12, 32e9, 300, 150e9),
    "T4": Device(65e12, 0.32e12, 16e9, 70, 12e9),
    "MI300X": Device(1307e12, 5.3e12, 192e9, 750, 448e9),
}


def find_device(name: str) -> Device | None:
    """The data sheet of a device, or None if the table does not have it.

    `name` is what `torch.cuda.get_device_name` returns, or what a user types. A laptop's GPU has
    the name of a faster one.
    """
    words = in_words(name)
    if " laptop " in words:
        return None
    for known, device in DEVICES.items():
        if in_words(known) in words:
            return device
    return None


def in_words(name: str) -> str:
    """The name in lower case with a space around every word, so that "L4" does not match "L40S"."""
    return f" {name.lower().replace('-', ' ')} "


def allowed_cores() -> int:
    """The CPU cores that this process may use: its affinity, limited by the quota of its cgroup."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # apply the container's CPU quota, which os.cpu_count does not know (cgroup v2, then v1)
    for names in ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]:
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            cores = min(cores, int(quota) / int(period))
    return max(1, round(cores))
