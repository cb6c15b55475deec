"""Seeds for independent random streams."""
import hashlib


def seed_of(*parts) -> int:
    """A 63-bit seed for the random stream that `parts` name, say (seed, step, rank): near parts, unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
