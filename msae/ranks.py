"""Which process of a distributed run this is, before anything is imported that would know."""

import os


def is_other_rank() -> bool:
    """Whether this process is not the first of its run; launchers say so in the environment."""
    return any(int(os.environ.get(v, 0)) > 0 for v in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
