"""python -m msae.train: find or make the shards, train, calibrate, export `sae/`, evaluate."""

from omegaconf import DictConfig

from msae.config import command, find_source
from msae.schema import TrainConfig


@command("train", TrainConfig, before=find_source)
def main(cfg: DictConfig) -> None:
    from msae.training import job  # Lightning takes seconds to import; a model that is not there is said before

    job.run(cfg)


if __name__ == "__main__":
    main()
