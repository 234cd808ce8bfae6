"""python -m msae.export sae=<run> to=<format> out=<directory>: an SAE in the form of another library, or on the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from msae.cli.command import command
from msae.interop import dictionary_learning, saelens, sparsify
from msae.runs import open_run
from msae.sae import MatryoshkaSAE, save_sae, truncate
from msae.settings import Count, settings

HUB = "hub:"
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


@settings
class Export:
    """`python -m msae.export`."""

    sae: str
    """runs/<run>, a directory in any form that is read, or hub:user/repo/sae_id."""
    revision: str | None = None
    """Branch, tag or commit of an SAE on the Hub."""
    prefix: Count | None = None
    """Only the first so many latents."""
    own_threshold: bool = False
    """With `prefix`: the threshold calibrated for these latents alone."""
    to: Literal["saelens", "saelens_training", "dictionary_learning", "sparsify"] = "saelens"
    """The form to write."""
    out: str | None = None
    """A new or empty directory to write to."""
    push: str | None = None
    """user/repo or user/repo/sae_id on the Hugging Face Hub."""
    private: bool = False
    """Make the repository private, where `push` makes one."""

    def __post_init__(self) -> None:
        if self.out is None and self.push is None:
            raise ValueError("nothing to write: give out=<directory> or push=user/repo")
        if self.out is None and self.to != "saelens":
            raise ValueError(f"to={self.to} needs out=<directory>; the Hub's layout is that of SAELens")
        if self.own_threshold and self.prefix is None:
            raise ValueError("own_threshold=true is for the first latents alone; give prefix=<m> too")
        if self.revision is not None and not self.is_on_hub:
            raise ValueError(f"revision={self.revision} is of the Hub; give it with sae={HUB}user/repo/sae_id")

    @property
    def is_on_hub(self) -> bool:
        return self.sae.startswith(HUB)


@command("export", Export)
def main(export: Export, _: DictConfig) -> None:
    out = None if export.out is None else Path(export.out)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} is not an empty directory; give another, or remove it first")
    sae = read(export)
    if export.prefix is not None:
        sae = truncate(sae, export.prefix, export.own_threshold)
    summary = f"d_in {sae.d_in}, d_sae {sae.d_sae}, prefixes {sae.prefixes}, {sae.sparsity.name}"
    if out is not None:
        write, opened_with = FORMATS[export.to]
        directory = write(sae, out)
        print(f"{directory}: {', '.join(sorted(p.name for p in directory.iterdir()))} ({summary})")
        print(f"open it: {opened_with.format(directory)}")
    if export.push is not None:
        push(sae, export, summary)


def read(export: Export) -> MatryoshkaSAE:
    """Read the SAE of a run, a directory, or the Hub. Raises ValueError in one line."""
    if not export.is_on_hub:
        return open_run(export.sae).load_sae()
    from msae.interop import hub  # the others need no network

    repo_id, sae_id = hub.split_reference(export.sae.removeprefix(HUB))
    return hub.pull(repo_id, sae_id, export.revision)


def push(sae: MatryoshkaSAE, export: Export, summary: str) -> None:
    """Upload the SAE to the Hub, with the configuration and the figures of its run, if it has one."""
    from msae.interop import hub

    assert export.push is not None
    repo_id, sae_id = hub.split_reference(export.push)
    sae_id = sae_id or str(sae.metadata.get("hook_name") or Path(export.sae).name)
    config, metrics = {}, {}
    if not export.is_on_hub:
        run = open_run(export.sae)
        # the run measured its prefixes with the threshold of all latents
        config, metrics = run.config, {} if export.own_threshold else run.outcome()[0]
    address = hub.push(sae, repo_id, sae_id, config or None, metrics, export.private)
    print(f"{address} ({summary})")
    print(f'open it: from sae_lens import SAE; sae = SAE.from_pretrained("{repo_id}", "{sae_id}")')


if __name__ == "__main__":
    main()
