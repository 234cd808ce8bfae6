"""python -m msae.report run=<run or SAE directory>: one HTML file in which a person explores the SAE."""

from omegaconf import DictConfig

from msae.config import command
from msae.schema import HierarchyConfig


@command("report", HierarchyConfig)
def main(cfg: DictConfig) -> None:
    from msae.hierarchy import job  # its imports take seconds; a mistyped key is said before

    job.report(cfg)


if __name__ == "__main__":
    main()
