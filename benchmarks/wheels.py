"""Collects wheels for a GPU machine that reaches no package registry: what msae needs beyond PyTorch's own stack.

    python benchmarks/wheels.py                     # into .wheels, for Python 3.12 on x86-64 Linux
    python benchmarks/wheels.py --peers             # and the published packages, into .wheels/peers
    python benchmarks/wheels.py --python 3.11 --into DIRECTORY

There must be there: torch, triton, numpy, scipy, lightning, transformers, accelerate, einops, jaxtyping, safetensors,
tensorboard, matplotlib, rich, tqdm, xxhash, filelock, pandas, pyarrow; for the tests pytest, pytest-xdist and joblib.
Wheels that lie in the directory are replaced, once all others are there.

The peers are a directory of their own because sae-lens needs transformer-lens 3 and msae 4: put them on the path, in
front, only where nothing of msae loads a language model.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = (
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "pydantic==2.14.4",  # msae.settings, so nearly every import of msae
    "pydantic-core==2.50.5",  # of that pydantic exactly
    "annotated-types==0.7.0",
    "typing-inspection==0.4.5",
    "transformer-lens==4.3.0",  # its other requirements are not imported: wandb, typeguard, fancy-einsum, beartype
    "datasets==5.2.0",  # reads text; transformer-lens imports it in any case
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "beartype==0.23.1",  # the tests
    "hydra-joblib-launcher==1.2.0",
)
SOURCES = ("antlr4-python3-runtime==4.9.3",)  # of Hydra and OmegaConf; published without a wheel
PEERS = ("sae-lens", "eai-sparsify")  # at the versions of peers/requirements.txt
OF_PEERS = (
    "simple-parsing==0.1.9",  # of both
    "docstring-parser==0.18.0",
    "natsort==8.4.0",  # of eai-sparsify
    "schedulefree==1.4.1",
    "transformer-lens==3.9.0",  # from here on imported by sae-lens, and not used in a step
    "better-abc==0.0.3",
    "wandb==0.31.0",  # most of all bytes
    "platformdirs==4.14.8",
    "opentelemetry-api==1.45.2",
)
LINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def pip(*arguments: str) -> None:
    """Exits with one line if pip fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")]
        sys.exit(f"pip {arguments[0]}: {(errors or lines)[-1]}")


def download(requirements: list[str], python: str, directory: Path) -> None:
    """Wheels of exactly these, none of what they require."""
    platforms = [word for name in LINUX for word in ("--platform", f"{name}_x86_64")]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    pip("download", "--quiet", *options, "--dest", str(directory), *requirements)


def published() -> list[str]:
    """PEERS as peers/requirements.txt pins them."""
    lines = (Path(__file__).resolve().parent / "peers" / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in PEERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path(".wheels"))
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--peers", action="store_true", help="the packages that a step is compared with, too")
    a = parser.parse_args()
    if a.into.exists() and not a.into.is_dir():
        sys.exit(f"--into {a.into} is a file; give a directory")
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary)
        download(list(OURS), a.python, new)
        pip("wheel", "--quiet", "--no-deps", "--use-pep517", "--wheel-dir", str(new), *SOURCES)
        if a.peers:
            download([*published(), *OF_PEERS], a.python, new / "peers")
        for old in [*a.into.glob("*.whl"), *a.into.glob("peers/*.whl")]:
            old.unlink()
        shutil.copytree(new, a.into, dirs_exist_ok=True)
    wheels = list(a.into.rglob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.1f} MiB: python benchmarks/gpu.py --wheels {a.into}")


if __name__ == "__main__":
    main()
