"""python -m msae.runs: every run, when, how far, its figures, and the settings in which they differ."""

from omegaconf import DictConfig

from msae.cli.command import command
from msae.cli.result import print_runs
from msae.runs import all_runs
from msae.settings import settings


@settings
class Runs:
    """`python -m msae.runs`."""

    runs: str = "runs"
    """Directory of the runs."""
    name: str | None = None
    """Only runs whose path contains this; null: all."""


@command("runs", Runs)
def main(options: Runs, _: DictConfig) -> None:
    found = [run for run in all_runs(options.runs) if (options.name or "") in str(run)]
    if not found:
        raise ValueError(f"there are no runs in {options.runs}; python -m msae.train makes one")
    print_runs(found)


if __name__ == "__main__":
    main()
