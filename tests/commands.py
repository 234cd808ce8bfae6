"""Running commands in tests: settings that make them short, processes of their own, what they leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from msae.sae import load_sae
from tests.test_model import same

TREE = ["data.source.rows=4000", "data.source.val_rows=1000", "data.source.chunk_rows=2000", "data.batch_tokens=128"]
SHORT = ["tokens=5000", "checkpoint_every_steps=5", "trainer.log_every_n_steps=5", "trainer.val_check_interval=10"]


def only_run(runs: str = "runs") -> Path:
    (run,) = Path(runs).iterdir()
    return run


def metrics_of(run: str | Path) -> dict[str, float]:
    return json.loads((Path(run) / "metrics.json").read_text())


def one_line(err: str) -> str:
    """The error line, which must be the last and the only one of its kind, without a traceback."""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def same_weights(a: Path, b: Path) -> None:
    one, other = load_sae(a / "sae").state_dict(), load_sae(b / "sae").state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "msae.train", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for(path: str, process: subprocess.Popen[str]) -> None:
    while not list(Path().glob(path)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
