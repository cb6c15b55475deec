"""Derives seeds, so that every random stream of a run is independent and reproducible."""
import hashlib


def derive_seed(*parts) -> int:
    """A 63-bit seed from `parts`, for example (seed, step, rank).

    The parts are hashed, so similar parts give unrelated seeds.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
