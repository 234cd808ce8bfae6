"""python -m msae.export sae=<run> to=<format> out=<directory>: an SAE in the form of another library, or on the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msae.config import command
from msae.interop import dictionary_learning, load, saelens, sparsify
from msae.sae import MatryoshkaSAE, save_sae
from msae.schema import ExportConfig

# How each format is written, and opened.
FORMATS: dict[str, tuple[Callable[[MatryoshkaSAE, Path], Path], str]] = {
    "saelens": (save_sae, 'from sae_lens import SAE; sae = SAE.load_from_disk("{}")'),
    "saelens_training": (
        saelens.save_training,
        'from sae_lens import TrainingSAE; sae = TrainingSAE.load_from_disk("{}")',
    ),
    "dictionary_learning": (
        dictionary_learning.save,
        'from dictionary_learning.utils import load_dictionary; sae, config = load_dictionary("{}", "cpu")',
    ),
    "sparsify": (sparsify.save, 'from sparsify import SparseCoder; sae = SparseCoder.load_from_disk("{}")'),
}
HUB = "hub:"


@command("export", ExportConfig)
def main(cfg: DictConfig) -> None:
    if cfg.out is None and cfg.push is None:
        raise ValueError("nothing to write: give out=<directory> or push=user/repo")
    if cfg.out is None and cfg.to != "saelens":
        raise ValueError(f"to={cfg.to} needs out=<directory>; the Hub's layout is that of SAELens")
    if cfg.own_threshold and cfg.prefix is None:
        raise ValueError("own_threshold=true is for the first latents alone; give prefix=<m> too")
    if cfg.out is not None and Path(cfg.out).exists() and (not Path(cfg.out).is_dir() or any(Path(cfg.out).iterdir())):
        raise ValueError(f"out={cfg.out} is not an empty directory; give another, or remove it first")
    sae = read(cfg.sae, cfg.revision)
    if cfg.prefix is not None:
        sae = sae.truncate(cfg.prefix, cfg.own_threshold)
    what = f"d_in {sae.d_in}, d_sae {sae.d_sae}, prefixes {sae.prefixes}, {sae.sparsity}"
    if cfg.out is not None:
        write, opened_with = FORMATS[cfg.to]
        directory = write(sae, Path(cfg.out))
        print(f"{directory}: {', '.join(sorted(p.name for p in directory.iterdir()))} ({what})")
        print(f"open it: {opened_with.format(directory)}")
    if cfg.push is not None:
        push(sae, cfg, what)


def read(sae: str, revision: str | None) -> MatryoshkaSAE:
    """The SAE of a run, a directory, or `hub:user/repo/sae_id`. Raises ValueError in one line."""
    if not sae.startswith(HUB):
        if revision is not None:
            raise ValueError(f"revision={revision} is of the Hub, and sae={sae} is not; give sae={HUB}user/repo/sae_id")
        return load(sae)
    from msae.interop import hub  # the others need no network

    repo_id, sae_id = hub.split_reference(sae.removeprefix(HUB))
    return hub.pull(repo_id, sae_id, revision)


def push(sae: MatryoshkaSAE, cfg: DictConfig, what: str) -> None:
    """Upload to the Hub what belongs to the SAE: with the configuration and the figures of its run, if it has one."""
    from msae.interop import hub

    repo_id, sae_id = hub.split_reference(cfg.push)
    sae_id = sae_id or str(sae.metadata.get("hook_name") or Path(cfg.sae).name)
    source = Path(cfg.sae)
    run = source.parent if source.name == "sae" else source
    config, metrics = run / "config.yaml", run / "metrics.json"
    runner_cfg: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True) if config.exists() else None
    # the run measured its prefixes with the threshold of all latents
    figures = json.loads(metrics.read_text()) if metrics.exists() and not cfg.own_threshold else None
    address = hub.push(sae, repo_id, sae_id, runner_cfg=runner_cfg, metrics=figures, private=cfg.private)
    print(f"{address} ({what})")
    print(f'open it: from sae_lens import SAE; sae = SAE.from_pretrained("{repo_id}", "{sae_id}")')


if __name__ == "__main__":
    main()
