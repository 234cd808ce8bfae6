"""Processes that take turns: each computes when it is asked, while the others wait."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any


class Worker:
    """The benchmark that runs, started once more for one method: `--worker NAME` behind the same arguments."""

    def __init__(self, name: str, python: str, environment: dict[str, str]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, *sys.argv, "--worker", name],
            text=True,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self.greeting = self.answer()

    def answer(self) -> Any:
        """The next line it says. Exits with what it wrote to stderr if it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"{self.name} failed:\n{self.errors.read()}")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        """The answer to a question."""
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.answer()


def take_turns(
    pythons: dict[str, str], question: Any, rounds: int, environment: Callable[[str], dict[str, str]] = lambda _: {}
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Ask a process for each name, run by its Python, in turn. Returns their greetings, and their answers by round."""
    workers: dict[str, Worker] = {}
    answers: dict[str, list[Any]] = {name: [] for name in pythons}
    try:
        for _ in range(rounds):
            for name, python in pythons.items():
                if name not in workers:  # one starts when those before it wait
                    workers[name] = Worker(name, python, environment(name))
                answers[name].append(workers[name].ask(question))
    finally:
        for worker in workers.values():
            worker.process.kill()
    return {name: worker.greeting for name, worker in workers.items()}, answers


def serve(prepare: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    """The other side of a Worker: `prepare` gives the greeting, and the function that answers a question.

    Answers go where stdout went; what packages print goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    greeting, answer = prepare()
    print(json.dumps(greeting), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out)
