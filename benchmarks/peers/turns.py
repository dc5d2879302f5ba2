"""How contenders of a benchmark take turns, so that whatever else the machine does falls on all of them.

Each contender is a process of its own that works only when told to. A referee (`Contender`) sends orders, one JSON
object a line, on the process's stdin; the process (`Turns`) does the work of its own training loop until the next
order is due and answers on a pipe of its own, because libraries print. The standard library is enough for both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """The contender's side: call `step` after every training step; it returns when another one is wanted.

    Args:
        answers: file descriptor that answers go to.
    """

    def __init__(self, answers: int):
        self._answers = os.fdopen(answers, "w")
        self._left, self._began = 0, (0.0, 0.0)
        self.seconds: Counter[str] = Counter()
        self.told: dict[str, float] = {}

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Counts the wall time of the block as time spent in `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def step(self) -> None:
        """A step is done, or none has begun; blocks until the next one is ordered."""
        if self._left > 0:
            self._left -= 1
            if self._left == 0:
                wall, cpu = self._now()
                answer = {"wall": wall - self._began[0], "cpu": cpu - self._began[1], "peak_mib": peak_mib()}
                self._answers.write(json.dumps(answer | {"parts": dict(self.seconds)} | self.told) + "\n")
                self._answers.flush()
        while self._left == 0:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self._left = json.loads(line)["steps"]
            self.seconds.clear()
            self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def peak_mib() -> float:
    """Most memory this process has held, in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


class Contender:
    """The referee's side of one process.

    Args:
        name: how results call it.
        python: interpreter whose environment has the library.
        driver: script that builds a `Turns` from `json.loads(sys.argv[1])["answers"]` and trains.
        settings: what the driver is told, besides `answers`.
    """

    def __init__(self, name: str, python: Path, driver: Path, settings: dict):
        self.name = name
        readable, writable = os.pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(settings["threads"]),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._log = tempfile.NamedTemporaryFile("w", prefix="unbraid-benchmark-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), str(driver), json.dumps(settings | {"answers": writable})],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            env=environment,
            pass_fds=[writable],
        )
        os.close(writable)
        self._answers = os.fdopen(readable)

    def train(self, steps: int) -> dict:
        """What `steps` steps took: seconds of wall and CPU time, `parts`, peak memory."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; its last words are in {self._log.name}")
        return json.loads(line)

    def dismiss(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        os.unlink(self._log.name)
