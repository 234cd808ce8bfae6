"""python -m msae.report run=<run or SAE directory>: one HTML file in which a person explores the SAE."""

from omegaconf import DictConfig

from msae.cli.command import command
from msae.explorer.inputs import Explore


@command("report", Explore)
def main(explore: Explore, _: DictConfig) -> None:
    from msae.explorer import job  # its imports take seconds; a mistyped key is reported before

    job.write_report(explore)


if __name__ == "__main__":
    main()
