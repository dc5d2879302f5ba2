"""Dictionaries from any site to any site on SmolLM2, beside what others train.

    python study/sites.py harvest       # rows of one pass at every site below, and of a fine-tuned copy of the model
    python study/sites.py transcoder    # an MLP's transcoder beside eai-sparsify's (`make peers` first)
    python study/sites.py crosscoder    # three layers, beside a plain autograd version of the published formulas
    python study/sites.py diffing       # a crosscoder over two models: the same one twice, and a fine-tuned copy
    python study/sites.py warm          # SAEs that start from the layer below's, at four lengths of training
    python study/sites.py finetune      # the packaged dictionary, fine-tuned at the end of the model

Results are JSON lines in `results/sites.jsonl`; what is there already is not made again. Rows are kept in `--rows`.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid import formats, recipes
from unbraid.activations.live import LiveActivations
from unbraid.activations.load import load_model_and_tokenizer
from unbraid.activations.rows import RowFilter
from unbraid.config import OptimiserConfig, RunConfig, SAEConfig, VariantConfig, overridden
from unbraid.config.decorrelation import DecorrelationConfig
from unbraid.finetuning import finetune
from unbraid.sae.crosscoder import by_site, exclusive_features, relative_norms
from unbraid.sites import Route
from unbraid.text import open_source
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, ends, train_step, trainer_from_settings
from unbraid.training.start import start_from

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "sites.jsonl"
ONE_PASS = ["resid_post.2", "resid_post.5", "mlp_in.6", "mlp_out.6", "resid_post.8"]
MLP, LAYERS = "mlp_in.6 -> mlp_out.6", "resid_post.2 + resid_post.5 + resid_post.8"
DIFFED = "resid_post.6"
HELD_OUT, BATCH = 16_384, 1_024
ROWS = HELD_OUT + 280 * BATCH
N, K = 4_608, 32
RATES = (5e-4, 1e-3, 2e-3)
PLAIN_ROWS, PLAIN_RATE = HELD_OUT + 80 * BATCH, 1e-3
"""Of the crosscoder: the plain formulas take minutes."""
WARM_UP, DECAY = 20, 0.2
NEIGHBOURS = ["resid_post.4", "resid_post.5", "resid_post.6", "resid_post.7"]
LENGTHS = (70, 140, 210, 280)
"""Steps of training, each with a schedule of its own."""
FINETUNED_TOKENS, FINETUNED_SHARE = 24_576, 1.0
TUNED_STEPS, TUNED_BATCH, TUNED_RATE = 60, 8, 5e-5
CPU = torch.device("cpu")


def rates(lr: float, steps: int) -> list[float]:
    """Of each step: a short rise, then constant, then a fall to nothing; the same for everybody."""
    fall = DECAY * steps
    return [lr * min(1.0, (step + 1) / WARM_UP, (steps - step) / fall) for step in range(steps)]


def settings_of(sites: Sequence[str]) -> RunConfig:
    """SmolLM2 on the packaged text, read at `sites`."""
    return overridden(recipes.demo(), {"model.sites": list(sites), "variants": {"": {}}}, "sites")[0]


def harvest(folder: Path) -> None:
    """Rows of all sites of one pass, and of one site of the model, and of its fine-tuned copy, on half-foreign text."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "one_pass.safetensors").is_file():
        save_file(rows_of(settings_of(ONE_PASS)), folder / "one_pass.safetensors")
    if not (folder / "neighbours.safetensors").is_file():
        save_file(rows_of(settings_of(NEIGHBOURS)), folder / "neighbours.safetensors")
    if not (folder / "tuned.safetensors").is_file():
        config = settings_of([DIFFED])
        model, tokenizer = load_model_and_tokenizer(config.model, CPU)
        text = Halves(config)
        base = rows_of(config, model=model, tokenizer=tokenizer, text=text)[DIFFED]
        tune(model, tokenizer, text)
        tuned = rows_of(config, model=model, tokenizer=tokenizer, text=text)[DIFFED]
        save_file({"base": base, "tuned": tuned}, folder / "tuned.safetensors")


def rows_of(config: RunConfig, **given: Any) -> dict[str, Tensor]:
    """The first `ROWS` rows of every site, in bfloat16."""
    source = LiveActivations(config, CPU, **given)
    row_filter, parts, found = RowFilter(config.buffer, source.sites, source.special_ids), [], 0
    for chunk in source.chunks(None):
        parts.append([x_BD.bfloat16() for x_BD in row_filter(chunk)])
        found += len(parts[-1][0])
        print(f"\r{found:,} of {ROWS:,} rows", end="", file=sys.stderr)
        if found >= ROWS:
            break
    columns = zip(*parts, strict=True)
    return {str(site): torch.cat(column)[:ROWS] for site, column in zip(source.sites, columns, strict=True)}


class Halves:
    """The packaged text, every second document in capitals, which the copy is tuned on."""

    def __init__(self, config: RunConfig):
        self.config = config

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(open_source(self.config.text).documents()):
            if isinstance(document.text, str):
                yield document.text.upper() if number % 2 else document.text


def tune(model: Any, tokenizer: Any, text: Halves) -> None:
    """A few steps of language modelling on the capitals."""
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=TUNED_RATE)
    ids = itertools.chain.from_iterable(tokenizer(one)["input_ids"] for one in itertools.islice(text, 1, None, 2))
    length = settings_of([DIFFED]).text.context_length
    for step in range(TUNED_STEPS):
        tokens = torch.tensor(list(itertools.islice(ids, TUNED_BATCH * length))).view(TUNED_BATCH, length)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(f"\rtuning step {step + 1}: loss {loss.item():.2f}", end="", file=sys.stderr)
    model.eval().requires_grad_(False)


def trainer_of(route: str, rows: dict[str, Tensor], architecture: str, lr: float, n: int, **sae: Any) -> SAETrainer:
    """A trainer before its first step, its units from the rows that are trained on."""
    parsed = Route.parse(route)
    sites = [site for site in parsed.ends if str(site) in rows or site.path in rows]
    named = [rows[str(site)] if str(site) in rows else rows[site.path] for site in sites]
    units = [Normalisation.of(x_RD[HELD_OUT:].float(), "rows") for x_RD in named]
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture=architecture, n_features=n, k=K, **sae),
        optimiser=OptimiserConfig(lr=lr, warmup_steps=0),
        decorrelation=DecorrelationConfig(method="none"),
    )
    steps = (len(named[0]) - HELD_OUT) // BATCH
    inputs, own, target = ends(parsed, sites, units)
    return trainer_from_settings(route, inputs, settings, 0, own, CPU, steps=steps, tokens=steps * BATCH, target=target)


def batches(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of the rows that are trained on, in their order."""
    for start in range(HELD_OUT, len(rows[0]) - BATCH + 1, BATCH):
        yield [x_RD[start : start + BATCH].float() for x_RD in rows]


def trained(trainer: SAETrainer, rows: Sequence[Tensor], lr: float) -> SAETrainer:
    """After one pass over the rows."""
    schedule = rates(lr, trainer.steps)
    for step, batch in enumerate(batches(rows)):
        x_BD, y_BM = trainer.rows(batch)
        train_step(trainer, x_BD, step, schedule[step], log=False, y_BM=y_BM)
    return trainer


@torch.no_grad()
def unexplained(wanted: Tensor, found: Tensor) -> float:
    """Share of the variance that is left."""
    return float((wanted - found).double().square().sum() / (wanted - wanted.mean(0)).double().square().sum())


@torch.no_grad()
def held_out_fvu(trainer: SAETrainer, rows: Sequence[Tensor]) -> float:
    """On the rows that nothing was trained on."""
    x_BD, y_BM = trainer.rows([x_RD[:HELD_OUT].float() for x_RD in rows])
    return unexplained(x_BD if y_BM is None else y_BM, torch.cat([trainer.sae(part) for part in x_BD.split(2048)]))


def note(settings: dict[str, Any], make: Any) -> dict[str, Any]:
    """A line of results, made unless it is there."""
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    for line in known:
        if line["settings"] == settings:
            return line
    line = {"settings": settings} | make()
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, file=sys.stderr)
    return line


def transcoder(folder: Path, peers: str) -> None:
    """TopK transcoders of an MLP, ours and eai-sparsify's, with and without a skip connection, at the same rates."""
    path = folder / "one_pass.safetensors"
    rows = load_file(path)
    sites = MLP.split(" -> ")
    steps = (ROWS - HELD_OUT) // BATCH
    for skip, lr in itertools.product((False, True), RATES):
        common = {"what": "transcoder", "route": MLP, "n": N, "k": K, "rows": ROWS, "skip": skip, "lr": lr}

        def ours(skip: bool = skip, lr: float = lr) -> dict[str, Any]:
            named = [rows[site] for site in sites]
            return {"fvu": held_out_fvu(trained(trainer_of(MLP, rows, "topk", lr, N, skip=skip), named, lr), named)}

        def theirs(skip: bool = skip, lr: float = lr) -> dict[str, Any]:
            asked = {"rows": str(path), "ends": sites, "batch": BATCH, "held_out": HELD_OUT, "steps": steps, "seed": 0}
            asked |= {"n_features": N, "k": K, "skip": skip, "lrs": rates(lr, steps)}
            command = [peers, str(Path(__file__).parent / "peers" / "sparsify_transcoder.py"), json.dumps(asked)]
            return json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )

        note(common | {"by": "unbraid"}, ours)
        note(common | {"by": "eai-sparsify 1.3.3"}, theirs)


class Plain(nn.Module):
    """TopK crosscoder as published, written out site by site: an encoder and a decoder for each, one set of codes.

    f keeps the K largest of relu(sum_l x_l W_enc_l + b_enc) sum_l ||W_dec_l||, y_l = f W_dec_l + b_l, and the loss is
    the mean of sum_l ||x_l - y_l||^2.
    """

    def __init__(self, widths: Sequence[int], start: Any):
        super().__init__()
        self.encoders = nn.ParameterList(part.clone() for part in start.encoder_ND.split(list(widths), 1))
        self.decoders = nn.ParameterList(part.clone() for part in start.W_dec.split(list(widths), 1))
        self.offsets = nn.ParameterList(torch.zeros(width) for width in widths)
        self.b_enc = nn.Parameter(torch.zeros(len(start.W_dec)))

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Reconstructions of each site."""
        pre = (sum(x @ w.T for x, w in zip(parts, self.encoders, strict=True)) + self.b_enc).relu()
        norms = sum(w.norm(dim=1) for w in self.decoders)
        kept = (pre * norms).topk(K, dim=1).indices
        f_BN = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
        return [f_BN @ w + b for w, b in zip(self.decoders, self.offsets, strict=True)]


def crosscoder(folder: Path) -> None:
    """Three layers at once: ours beside the plain formulas from the same first weights."""
    sites, lr = LAYERS.split(" + "), PLAIN_RATE
    rows = {site: x_RD[:PLAIN_ROWS] for site, x_RD in load_file(folder / "one_pass.safetensors").items()}
    named = [rows[site] for site in sites]
    common = {"what": "crosscoder", "route": LAYERS, "n": N, "k": K, "rows": PLAIN_ROWS, "lr": lr}

    def ours(row_norm: str = "joint") -> dict[str, Any]:
        trainer = trainer_of(LAYERS, rows, "topk", lr, N, row_norm=row_norm)
        return {"fvu": held_out_fvu(trained(trainer, named, lr), named)}

    def plain() -> dict[str, Any]:
        first = trainer_of(LAYERS, rows, "topk", lr, N)
        widths = [x_RD.shape[1] for x_RD in named]
        model = Plain(widths, first.sae)
        optimiser = torch.optim.Adam(model.parameters())
        schedule = rates(lr, first.steps)
        for step, batch in enumerate(batches(named)):
            parts = first.rows(batch)[0].split(widths, 1)
            found = model(parts)
            loss = sum(F.mse_loss(y, x, reduction="sum") for x, y in zip(parts, found, strict=True)) / BATCH
            optimiser.param_groups[0]["lr"] = schedule[step]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        wanted = first.rows([x_RD[:HELD_OUT].float() for x_RD in named])[0]
        with torch.no_grad():
            found = torch.cat([torch.cat(model(part.split(widths, 1)), 1) for part in wanted.split(2048)])
        return {"fvu": unexplained(wanted, found)}

    note(common | {"by": "unbraid"}, ours)
    note(common | {"by": "unbraid", "row_norm": "sum"}, lambda: ours("sum"))
    note(common | {"by": "plain autograd"}, plain)


def diffing(folder: Path) -> None:
    """Which features write into one model alone, by the threshold of `unbraid.sae.crosscoder`, stated beforehand."""
    rows = load_file(folder / "tuned.safetensors")
    rows["copy"] = rows["base"].clone()
    for other, architecture in itertools.product(("copy", "tuned"), ("batch_topk", "topk")):
        route = f"handed_in:base + handed_in:{other}"
        common = {"what": "diffing", "route": route, "architecture": architecture, "n": N, "k": K, "rows": ROWS}

        def made(other: str = other, architecture: str = architecture, route: str = route) -> dict[str, Any]:
            named, lr = [rows["base"], rows[other]], 1e-3
            trainer = trained(trainer_of(route, rows, architecture, lr, N), named, lr)
            widths = [x_RD.shape[1] for x_RD in named]
            trainer.sae.metadata |= by_site(widths, trainer.normalise.scales(widths))
            x_BD, _ = trainer.rows([x_RD[:HELD_OUT].float() for x_RD in named])
            with torch.no_grad():
                live_N = sum((trainer.sae.encode(part) > 0).sum(0) for part in x_BD.split(2048)) > 0
                fvu = held_out_fvu(trainer, named)
            trainer.fold()
            first, second = (one[live_N[one]] for one in exclusive_features(trainer.sae))
            relative_NL = relative_norms(trainer.sae)[live_N]
            shares = (relative_NL[:, 0] / relative_NL.sum(1)).double()
            return {
                "fvu": fvu,
                "live": int(live_N.sum()),
                "exclusive": {"base": len(first), other: len(second)},
                "share_of_base": {f"{q:g}": round(float(shares.quantile(q)), 4) for q in (0.01, 0.1, 0.5, 0.9, 0.99)},
            }

        note(common, made)


def warm(folder: Path) -> None:
    """What starting from the SAE of the layer below saves: held-out loss after several lengths of training."""
    rows = load_file(folder / "neighbours.safetensors")
    for below, site in itertools.pairwise(NEIGHBOURS):
        start = folder / f"sae-{below}"
        if not start.is_dir():
            source = trained(trainer_of(below, {below: rows[below]}, "topk", 1e-3, N), [rows[below]], 1e-3)
            source.fold()
            formats.save(source.sae, start)
        for steps, begins in itertools.product(LENGTHS, ("drawn", below)):
            common = {"what": "warm", "route": site, "n": N, "k": K, "steps": steps, "lr": 1e-3, "start": begins}

            def made(steps: int = steps, begins: str = begins, site: str = site, start: Path = start) -> dict[str, Any]:
                some = rows[site][: HELD_OUT + steps * BATCH]
                given = {} if begins == "drawn" else {"start_from": str(start)}
                trainer = trainer_of(site, {site: some}, "topk", 1e-3, N, **given)
                start_from(trainer)
                first = held_out_fvu(trainer, [some])
                return {"fvu": held_out_fvu(trained(trainer, [some], 1e-3), [some]), "fvu_before": first}

            note(common, made)


def finetuned(folder: Path) -> None:
    """Cross-entropy score and L0 before and after; the decoder alone keeps every code as it was."""
    mse = FINETUNED_SHARE
    for learned in ("decoder", "all"):
        common = {"what": "finetune", "sae": "smollm2-demo", "tokens": FINETUNED_TOKENS, "learned": learned, "mse": mse}

        def made(learned: Any = learned) -> dict[str, Any]:
            out = folder / f"finetuned-{learned}"
            found = finetune(
                "smollm2-demo",
                out,
                tokens=FINETUNED_TOKENS,
                learned=learned,
                mse=mse,
                held_out_contexts=64,
                overwrite=True,
            )
            change = {"ce_change": found.ce_change, "ce_change_interval": found.ce_change_interval}
            return {"before": found.before._asdict(), "after": found.after._asdict()} | change

        note(common, made)


PARTS = {"crosscoder": crosscoder, "diffing": diffing, "warm": warm, "finetune": finetuned}


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["harvest", "transcoder", *PARTS])
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "sites")
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    if asked.what == "harvest":
        harvest(asked.rows)
    elif asked.what == "transcoder":
        transcoder(asked.rows, asked.peers_python)
    else:
        PARTS[asked.what](asked.rows)


if __name__ == "__main__":
    main()
