"""How contenders of a benchmark take turns, so that whatever else the machine does falls on all of them.

Each contender is a process of its own that works only when told to. A referee (`Contender`) sends orders, one JSON
object a line, on the process's stdin; the process (`Turns`) does the steps of its own training loop until the next
order is due and answers on a pipe of its own, because libraries print. The standard library is enough for both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """The contender's side: it says when a step is done and when the next begins; only between the two it is timed.

    The order {"steps": n} is answered when n steps are done: milliseconds of wall and CPU time of each, time spent in
    parts, peak memory. End of input ends the process.

    Args:
        answers: file descriptor that answers go to.
        others: what else can be ordered, by name, and what answers.
    """

    def __init__(self, answers: int, **others: Callable[[], dict]):
        self._answers, self._others = os.fdopen(answers, "w"), others
        self._left = 0
        self._began: tuple[float, float] | None = None
        self._wall_ms: list[float] = []
        self._cpu_ms: list[float] = []
        self._parts: Counter[str] = Counter()
        self.told: dict[str, float] = {}

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Counts the wall time of the block as time spent in `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] += 1e3 * (time.perf_counter() - began)

    def step(self) -> None:
        """A step is done, or none has begun; the next one begins when it is ordered."""
        self.finish()
        self.begin()

    def finish(self) -> None:
        """A step is done, or none has begun; blocks until another one is ordered."""
        if self._began is not None:
            self._wall_ms.append(1e3 * (time.perf_counter() - self._began[0]))
            self._cpu_ms.append(1e3 * (time.process_time() - self._began[1]))
            self._left -= 1
            if self._left == 0:
                times = {"wall_ms": self._wall_ms, "cpu_ms": self._cpu_ms, "parts_ms": self._parts}
                self._answer(times | {"peak_mib": resident_mib("VmHWM")} | self.told)
        while self._left == 0:
            self._take_order()

    def begin(self) -> None:
        """The next step begins now."""
        self._began = (time.perf_counter(), time.process_time())

    def _take_order(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        order = json.loads(line)
        self._left = order.pop("steps", 0)
        self._wall_ms, self._cpu_ms = [], []
        self._parts.clear()
        for name in order:
            self._answer(self._others[name]())

    def _answer(self, data: dict) -> None:
        self._answers.write(json.dumps(data) + "\n")
        self._answers.flush()


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (most so far) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


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
        """What `steps` steps took: `wall_ms` and `cpu_ms` of each, `parts_ms` of all, `peak_mib`."""
        return self.ask({"steps": steps})

    def ask(self, order: dict) -> dict:
        """The answer to an order."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
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
