"""python -m msae.train: find or make the shards, train, calibrate, export `sae/`, evaluate."""

from omegaconf import DictConfig

from msae.cli.arms import describe_arms, recipes_of
from msae.cli.command import command, job_directory, plain
from msae.cli.result import print_result
from msae.training.settings import Train


@command("train", Train)
def main(train: Train, cfg: DictConfig) -> None:
    arms = describe_arms(train)
    recipes = recipes_of(train, arms, cfg.model)
    train.data.identify()
    from msae.training import job  # Lightning takes seconds to import; a mistake is said before

    run, metrics, failed = job.train(train, arms, recipes, plain(cfg), job_directory())
    if metrics:  # none in another rank
        print_result(run, metrics)
    if failed and job_directory() is None:  # a sweep counts them itself
        raise SystemExit(1)


if __name__ == "__main__":
    main()
