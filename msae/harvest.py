"""python -m msae.harvest: the first half of the job alone, or `verify=<shard directory>` to check one fully."""

from omegaconf import DictConfig

from msae.cli.command import command, plain
from msae.data.activations import Data
from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.progress import progress
from msae.settings import decode, settings
from msae.training.settings import Train

OF_TRAINING = ("name", "tokens", "model", "trainer", "evaluation")  # may be incomplete


@settings
class Harvest(Train):
    """`python -m msae.harvest`: the keys of training, so that an experiment serves both."""

    verify: str | None = None
    """A shard directory to check instead of harvesting."""


@command("harvest", Harvest, may_lack=OF_TRAINING)
def main(_: Harvest | None, cfg: DictConfig) -> None:
    if cfg.verify is not None:
        shards = Shards(cfg.verify)
        with progress(sum(entry.bytes for entry in shards.files().values()), "verify", unit="B") as bar:
            shards.verify(bar.update)
        print(f"{shards.directory}: {len(shards.manifest.shards)} shards, every checksum right")
        return
    data = decode(Data, plain(cfg)["data"], "data")
    for hook, shards in harvest(data.source, data.root, data.max_disk_gb).items():
        rows = {split: sum(shards.rows(split)) for split in ("train", "val")}
        counts = f"{rows['train']:,} training rows, {rows['val']:,} held out, d_in {shards.d_in}"
        print(f"{hook}: {counts}: {shards.directory}")


if __name__ == "__main__":
    main()
