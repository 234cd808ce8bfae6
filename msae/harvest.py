"""python -m msae.harvest: the first half of the job alone, or `verify=<shard directory>` to check one fully."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from msae.config import command, find_source
from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.progress import progress
from msae.schema import HarvestConfig


@command("harvest", HarvestConfig, before=find_source)
def main(cfg: DictConfig) -> None:
    if cfg.verify is not None:
        shards = Shards(cfg.verify)
        files = [*shards.manifest["shards"], *filter(None, [shards.manifest["truth"]])]
        with progress(sum(entry["bytes"] for entry in files), "verify", unit="B") as bar:
            shards.verify(bar.update)
        print(f"{shards.directory}: {len(shards.manifest['shards'])} shards, every checksum right")
        return
    from msae.data.datamodule import ActivationData  # imports Lightning, which takes seconds

    data: ActivationData = instantiate(cfg.data)
    if data.rolling_gb is not None:
        raise ValueError(
            f"data.rolling_gb={data.rolling_gb:g} harvests while training reads: run python -m msae.train, "
            "or harvest the whole with data.rolling_gb=null"
        )
    for hook, shards in harvest(data.source, data.root, data.max_disk_gb).items():
        rows = {split: sum(shards.rows(split)) for split in ("train", "val")}
        print(
            f"{hook}: {rows['train']:,} training rows, {rows['val']:,} held out, d_in {shards.d_in}: {shards.directory}"
        )


if __name__ == "__main__":
    main()
