"""python -m msae.evaluate sae=<run or SAE directory>: everything that training measures at its end, of any SAE."""

from omegaconf import DictConfig

from msae.cli.command import command
from msae.cli.result import print_comparison, print_figures
from msae.evaluation.job import JSON, PICTURE, Evaluate, evaluate_all
from msae.progress import say


@command("evaluate", Evaluate)
def main(options: Evaluate, _: DictConfig) -> None:
    figures = evaluate_all(options)
    if len(figures) == 1:
        print_figures(*figures.values())
    else:
        print_comparison(figures, "sae")
    if options.out is not None:
        say(f"figures: {options.out}/{JSON}\npicture: {options.out}/{PICTURE}")


if __name__ == "__main__":
    main()
