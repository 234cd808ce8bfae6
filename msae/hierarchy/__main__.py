"""python -m msae.hierarchy run=<run or SAE directory>: edges between latents, tests, controls, `hierarchy.json`."""

from omegaconf import DictConfig

from msae.config import command
from msae.schema import HierarchyConfig


@command("hierarchy", HierarchyConfig)
def main(cfg: DictConfig) -> None:
    from msae.hierarchy import job  # its imports take seconds; a mistyped key is said before

    job.hierarchy(cfg)


if __name__ == "__main__":
    main()
