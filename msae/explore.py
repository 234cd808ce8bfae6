"""python -m msae.explore run=<run or SAE directory>: edges between latents, tests, controls, and a page to explore."""

from omegaconf import DictConfig

from msae.cli.command import command
from msae.explorer.inputs import Explore


@command("explore", Explore)
def main(explore: Explore, _: DictConfig) -> None:
    from msae.explorer import job  # its imports take seconds; a mistyped key is reported before

    job.explore(explore)


if __name__ == "__main__":
    main()
