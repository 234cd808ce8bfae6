"""SAEs on the Hugging Face Hub: one folder an SAE, in SAELens's layout, with a card that tells how it was trained."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from msae.files import write_json
from msae.interop import dictionary_learning, load, sparsify
from msae.sae import MatryoshkaSAE, save_sae
from msae.sae.files import CONFIG, WEIGHTS
from msae.settings import flat

# Of all forms that are read.
FILES = {CONFIG, WEIGHTS} | {name for form in (sparsify, dictionary_learning) for name in (form.CONFIG, form.WEIGHTS)}
FIGURES = ("fvu", "l0", "dead", "ce_score")


def push(
    sae: MatryoshkaSAE,
    repo_id: str,
    sae_id: str,
    runner_cfg: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    private: bool = False,
) -> str:
    """Upload the SAE to `<repo_id>/<sae_id>/` in one commit, making the repo where there is none; return its address.

    runner_cfg: the run's resolved configuration. metrics: `val/{name}/p{width}`, as in metrics.json. The folder's
    README.md is the SAE's card; a repo without a README.md gets it too, and one that has it keeps its own. Raises
    ValueError in one line.
    """
    check_sae_id(sae_id)
    with TemporaryDirectory() as temporary:
        folder = save_sae(sae, Path(temporary) / sae_id)
        if runner_cfg is not None:
            write_json(folder / "runner_cfg.json", dict(runner_cfg), indent=2)
        text = card(sae, repo_id, sae_id, metrics or {})
        (folder / "README.md").write_text(text)
        with _explained(f"push to {repo_id}"):
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            if not api.file_exists(repo_id, "README.md"):
                (Path(temporary) / "README.md").write_text(text)
            api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=f"Upload SAE {sae_id}")
    return f"https://huggingface.co/{repo_id}/tree/main/{sae_id}"


def pull(repo_id: str, sae_id: str, revision: str | None = None) -> MatryoshkaSAE:
    """Download an SAE in any form that `msae.interop.load` reads (or take it from the Hub's local cache).

    Raises ValueError in one line.
    """
    check_sae_id(sae_id)
    patterns = [f"{sae_id}/{name}" for name in FILES]
    with _explained(f"pull {sae_id} from {repo_id}"):
        root = HfApi().snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    folder = Path(root) / sae_id
    if not folder.is_dir():
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"{repo_id}{at} has no SAE {sae_id}; see the folders at https://huggingface.co/{repo_id}")
    return load(folder)


def check_sae_id(sae_id: str) -> None:
    """Raise ValueError in one line unless this is a plain path inside a repo."""
    if not all(re.fullmatch(r"[\w.+=,@-]+", part) and part.strip(".") for part in sae_id.split("/")):
        raise ValueError(
            f"sae_id={sae_id!r} is not a folder inside the repo; use letters, digits, . _ - and /, "
            "e.g. blocks.8.hook_resid_pre"
        )


def split_reference(reference: str) -> tuple[str, str]:
    """Split `user/repo/sae_id` into `user/repo` and `sae_id`, "" if not given. Raises ValueError in one line."""
    user, _, rest = reference.partition("/")
    repo, _, sae_id = rest.partition("/")
    if not user or not repo:
        raise ValueError(f"{reference!r} names no SAE on the Hub, expected user/repo/sae_id")
    return f"{user}/{repo}", sae_id


@contextmanager
def _explained(action: str) -> Iterator[None]:
    """Raise whatever the Hub and the network raise as a ValueError in one line that says what to do."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        name = type(error).__name__
        if status in (401, 403) or name == "LocalTokenNotFoundError":
            hint = "check the name, and log in with `hf auth login` (or set HF_TOKEN)"
        elif status == 404:
            hint = "check the name and the revision"
        elif isinstance(error, HTTPError) or name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError"):
            hint = "the Hub cannot be reached from here; give a local directory instead"
        else:
            hint = ""
        lines = str(error).strip().splitlines() or [name]
        raise ValueError(f"cannot {action}: {lines[0].rstrip('. ')}" + (f"; {hint}" if hint else "")) from error


# --- the card ---------------------------------------------------------------------------------------------------------


def card(sae: MatryoshkaSAE, repo_id: str, sae_id: str, metrics: Mapping[str, float]) -> str:
    """Write the README.md of one SAE: where it belongs, its sizes, figures of each prefix, loading it, its training."""
    metadata = sae.metadata
    about = {
        "model": metadata.get("model_name"),
        "hook": metadata.get("hook_name"),
        "target hook": metadata.get("hook_name_out"),
        "dataset": metadata.get("dataset_path"),
        "context": metadata.get("context_size"),
        "d_in": sae.d_in,
        "d_out": sae.d_out if sae.is_transcoder else None,
        "d_sae": sae.d_sae,
        "prefixes": sae.prefixes,
        "sparsity": sae.sparsity.name,
        "k": sae.k,
        "L0": metrics.get(f"val/l0/p{sae.d_sae}", metadata.get("l0")),
        "trained with": metadata.get("trained_with"),
    }
    details, ours = metadata.get("training_architecture_details") or {}, metadata.get("msae") or {}
    training = {**details, **(ours.get("training") or {})}
    sections = [
        "---\nlibrary_name: saelens\ntags:\n- saelens\n- msae\n- sparse-autoencoder\n- matryoshka\n---",
        f"# {sae_id}",
        f"A Matryoshka sparse {'transcoder' if sae.is_transcoder else 'autoencoder'}: each prefix of its latents "
        "reconstructs by itself. Raw activations in and out; normalisation is folded into the weights.",
        _table(("", ""), [(key, value) for key, value in about.items() if value is not None]),
        *_figures(sae, metrics),
        "## Load it",
        f'```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "{sae_id}")\n```',
        "With its prefixes:",
        "```python\nfrom msae.interop.hub import pull\n\n"
        f'sae = pull("{repo_id}", "{sae_id}")\n'
        "acts = sae.encode(x)\nrecon = sae.decode(acts, prefix=sae.prefixes[0])\n```",
        *(["## Training", _table(("setting", "value"), list(flat(training).items()))] if training else []),
    ]
    return "\n\n".join(sections) + "\n"


def _figures(sae: MatryoshkaSAE, metrics: Mapping[str, float]) -> list[str]:
    names = [name for name in FIGURES if f"val/{name}/p{sae.d_sae}" in metrics]
    if not names:
        return []
    rows = [(w, *(metrics.get(f"val/{name}/p{w}") for name in names)) for w in sae.prefixes]
    return ["## Figures on held-out data", _table(("prefix", *names), rows)]


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
