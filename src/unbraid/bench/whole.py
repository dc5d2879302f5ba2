"""`unbraid bench pipeline | harvest | synth`: from text to trained SAEs, the model alone, samples with known features.

Users wait for tokens, not for steps. A turn of a pipeline is one refill of the buffer and the steps that use it up, the
SAEs, penalties and logs those of the recipe; a turn of a harvest is one model batch; what text and tokenizer cost is in
both. Recipes take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.rows import Chunk, RowFilter
from unbraid.activations.source import ActivationSource
from unbraid.bench.steps import per_step
from unbraid.bench.timing import take_turns
from unbraid.config import RunConfig, VariantConfig
from unbraid.errors import TextError
from unbraid.randomness import generator
from unbraid.synthetic import World, build_world
from unbraid.training.fit import train_steps
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import new_trainer, trainer_from_settings

Source = Callable[[RunConfig, torch.device], ActivationSource]


class Pipeline:
    """A contender: the steps of one refill a call, of every SAE of a run."""

    def __init__(self, config: RunConfig, source: ActivationSource, device: torch.device):
        self.config = config
        self.buffer = ActivationBuffer(source, config.buffer, config.training.batch_tokens, config.seed, device=device)
        self.buffer.fill()
        sites = list(zip(config.sites, self.buffer.rows(), strict=True))
        normalise = [Normalisation.of(rows_RD, str(site)) for site, rows_RD in sites]
        self.trainers = [
            new_trainer(config, place, variant, normalise, device)
            for place in range(len(config.routes))
            for variant in config.variants
        ]
        self.steps = max(1, self.buffer.capacity // 2 // config.training.batch_tokens)
        self.done = 0

    @property
    def rows(self) -> int:
        """Rows learnt from in a call."""
        return self.steps * self.config.training.batch_tokens

    def __call__(self) -> None:
        """One refill and its steps.

        Raises:
            TextError: the text has been used up.
        """
        every, until = self.config.training.log_every, self.done + self.steps
        made = train_steps(
            self.trainers, self.buffer.next_batch, until, done=self.done, logged=lambda step: step % every == 0
        )
        if made < until:
            raise TextError(
                f"the text of {self.config.name} gives no more than {made} steps; expected {until}; lower --rounds"
            )
        self.done = until


class Harvest:
    """A contender: one model batch a call, read from the text, filtered, and put aside in float32."""

    def __init__(self, config: RunConfig, source: ActivationSource):
        self.filter = RowFilter(config.buffer, source.sites, source.special_ids)
        self.source, self.tokens = source, source.batch_contexts * source.context_length
        self.chunks: Iterator[Chunk] = source.chunks(None)

    def __call__(self) -> None:
        """One model batch; the text begins again when it ends."""
        chunk = next(self.chunks, None)
        if chunk is None or chunk.tokens_BT.numel() < self.tokens:
            self.chunks = self.source.chunks(None)
            chunk = next(self.chunks)
        self.filter(chunk)


def measure_recipes(
    kind: str,
    configs: Sequence[tuple[str, RunConfig]],
    open_source: Source,
    device: torch.device,
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Times of a turn of each recipe, and tokens per second.

    Args:
        kind: pipeline or harvest.
        configs: names and settings.
        open_source: how a run's activations are opened.
        device: where.
        rounds: turns of each, after two that warm up.
        say: told what is being prepared.

    Returns:
        A row for each recipe: `what`, `sites`, `saes`, `tokens` (of a turn), times of a turn, `tokens_per_second`.
    """
    contenders: dict[str, Pipeline | Harvest] = {}
    for name, config in configs:
        say(f"{kind}: {name}")
        source = open_source(config, device)
        contenders[name] = Pipeline(config, source, device) if kind == "pipeline" else Harvest(config, source)
    found = take_turns(contenders, rounds, device.type)
    rows = []
    for name, config in configs:
        contender = contenders[name]
        tokens = contender.rows if isinstance(contender, Pipeline) else contender.tokens
        report = found[name].report()
        saes = len(config.sae_names) if isinstance(contender, Pipeline) else 0
        row = {"what": name, "sites": len(config.sites), "saes": saes, "tokens": tokens, **report}
        rows.append(row | {"tokens_per_second": round(tokens / report["wall_ms"] * 1e3)})
    return rows


def measure_world(
    name: str,
    architectures: Sequence[VariantConfig],
    batch: int,
    device: torch.device,
    rounds: int,
    steps: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Samples per second of a synthetic world, alone and while an SAE learns from them.

    Args:
        name: of the world: unit, small, medium, full (that of SynthSAEBench).
        architectures: SAEs to train; each has a turn of its own, its samples drawn anew.
        batch: samples in a step.
        device: where they are drawn and trained on.
        rounds: turns of each.
        steps: in a turn.
        say: told what is being prepared.

    Returns:
        A row for the samples and for each SAE: `what`, `world`, times of a step, `samples_per_second`.
    """
    say(f"the world {name}")
    world = build_world(name, device)
    contenders: dict[str, Callable[[], None]] = {"samples": _sampler(world, batch, steps)}
    for settings in architectures:
        say(f"the world {name}: {settings.sae.architecture}")
        contenders[settings.sae.architecture] = _learner(world, settings, batch, steps)
    rows = []
    for what, times in take_turns(contenders, rounds, device.type).items():
        report = per_step(times.report(), steps)
        row = {"what": what, "world": name, "batch": batch, "features": world.n_features, **report}
        rows.append(row | {"samples_per_second": round(batch / report["wall_ms"] * 1e3)})
    return rows


def _sampler(world: World, batch: int, steps: int) -> Callable[[], None]:
    draws = generator(0, "bench", device=world.device)

    def draw() -> None:
        for _ in range(steps):
            world.sample(batch, draws)

    return draw


def _learner(world: World, settings: VariantConfig, batch: int, steps: int) -> Callable[[], None]:
    stream = world.batches(batch, generator(0, "bench", device=world.device))
    normalise = Normalisation.of(next(stream), "the world's samples")
    trainer = trainer_from_settings("bench", (0,), settings, 0, normalise, world.device)

    def learn() -> None:
        done = trainer.updates
        train_steps([trainer], lambda: [next(stream)], done + steps, done=done)

    return learn
