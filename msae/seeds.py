"""Independent random streams from one seed."""

import hashlib

import torch


def stream(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by its name, e.g. stream(seed, "world"): another name is an independent stream."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
