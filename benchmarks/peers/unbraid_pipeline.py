"""unbraid from text to trained SAEs, through `train_saes`; the model's share is measured at the chunk source."""

import json
import sys
from pathlib import Path

import torch
from turns import Turns

from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.rows import ChunkSource
from unbraid.config import RunConfig
from unbraid.run import open_activations
from unbraid.training.loop import train_saes
from unbraid.training.run_folder import RunFolder

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
turns = Turns(settings["answers"])
config = RunConfig.model_validate(settings["config"])


class Clocked:
    """A chunk source that says how long each chunk took."""

    def __init__(self, source: ChunkSource):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def chunks(self, position, held_out=False):
        chunks = self.source.chunks(position, held_out)
        while True:
            with turns.clock("model"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def next_batch(buffer, take=ActivationBuffer.next_batch):
    with turns.clock("feed"):
        return take(buffer)


class Paced:
    """Progress that lets the loop go on when the referee says so."""

    def filling(self, rows, capacity):
        pass

    def step(self, step, record):
        if record is not None:
            turns.told = {"l0": sum(sae["l0"] for sae in record["saes"].values()) / len(record["saes"])}
        turns.step()


run = Path(settings["run"])
folder = RunFolder(run) if (run / "config.json").exists() else RunFolder.create(run, config)
ActivationBuffer.next_batch = next_batch
source = Clocked(open_activations(config, torch.device("cpu")))
turns.step()
train_saes(folder, config, source, torch.device("cpu"), Paced())
