"""The figures of a part of benchmarks/gpu.py, written out row by row: what was measured stays if it is killed."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Report:
    """Rows of figures on their way to a JSON file, and the seconds that are left for more."""

    def __init__(self, path: Path | None = None, seconds: float = float("inf")) -> None:
        self.path, self.ends = path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    def row(self, name: str, ok: bool | None = None, **figures: Any) -> None:
        """One line of the table: a name, whether what was checked holds (None: nothing was), and figures by name."""
        self.rows.append({"name": name, **({} if ok is None else {"ok": ok}), **figures})
        if self.path is not None:
            whole = self.path.with_suffix(".new")
            whole.write_text(json.dumps(self.rows))
            whole.replace(self.path)  # a process may be killed while it writes
        print(line(self.rows[-1]), flush=True)

    def left(self) -> float:
        """Seconds until this part is killed."""
        return self.ends - time.monotonic()


class Scale(NamedTuple):
    """Where a part runs, and whether at sizes of a GPU or at tiny ones that only prove the script."""

    device: str

    @property
    def is_tiny(self) -> bool:
        return self.device == "cpu"

    def pick(self, real: Any, tiny: Any) -> Any:
        """One of two sizes."""
        return tiny if self.is_tiny else real

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if not self.is_tiny:
            torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    mark = {True: "ok   ", False: "FAILS", None: "     "}[row.get("ok")]
    figures = "  ".join(f"{name} {number(value)}" for name, value in row.items() if name not in ("name", "ok"))
    return f"{mark} {row['name']:<44} {figures}"


def number(value: Any) -> str:
    """A figure, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
