"""Named random generators derived from one seed.

Every use of chance in a run asks for its own generator by name, so adding a site, a variant or a plot never shifts
the random numbers anything else sees, and nothing reads torch's global state.
"""

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, stable across machines and Python versions."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the purpose `names`, e.g. `generator(0, "buffer")`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))
