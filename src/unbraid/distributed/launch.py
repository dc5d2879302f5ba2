"""The `torchrun` line that runs unbraid on many processes."""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Launch:
    """How many processes, where, and how often they may be started again."""

    ranks: int = 1
    """Processes on each node: one per GPU."""
    nodes: int = 1
    """Machines; with more than one, run the line on each."""
    rendezvous: str = "localhost:29400"
    """HOST:PORT at which several nodes find each other."""
    max_restarts: int = 3
    """How often a run whose rank died is started again, from its last checkpoint."""
    run: bool = False
    """Execute the line instead of printing it."""

    def torchrun(self, command: list[str]) -> list[str]:
        """The words of the line that runs `unbraid COMMAND`."""
        if self.nodes == 1:
            place = ["--standalone"]
        else:
            place = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous}"]
        count = f"--nproc-per-node={self.ranks}"
        # Without the dashes torchrun takes `--run` for an abbreviation of a flag of its own.
        return ["torchrun", *place, count, f"--max-restarts={self.max_restarts}", "-m", "--", "unbraid", *command]


def execute(words: list[str]) -> NoReturn:
    """Become `torchrun`, run by this Python."""
    python = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    sys.stdout.flush()
    os.execv(sys.executable, python)
