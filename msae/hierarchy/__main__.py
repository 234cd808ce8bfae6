"""python -m msae.hierarchy run=<run or SAE directory>: edges between latents, tests, controls, `hierarchy.json`."""

from omegaconf import DictConfig

from msae.cli.command import command
from msae.explorer.inputs import Explore


@command("hierarchy", Explore)
def main(explore: Explore, _: DictConfig) -> None:
    from msae.explorer import job  # its imports take seconds; a mistyped key is reported before

    job.write_hierarchy(explore)


if __name__ == "__main__":
    main()
