"""Where the remaining MCC goes: what decoders fitted to the truth reach, and how far trained SAEs are from it.

    python study/ceiling.py small          # results/ceiling.jsonl
    python study/ceiling.py medium
    python study/ceiling.py full           # SAEs of `full.py --only best batch_topk recipe`, once trained

With the true codes of N features given, no encoder can be at fault. *Least squares* still mixes into their rows what
fires with them and has no row of its own: hedging. A *robust* fit, which weighs tokens with large errors less, mixes in
less of it. The rungs of an SAE: the same two fits for the features that its own latents were matched to, least squares
on its own codes, and its decoder as trained.
"""

import argparse
from typing import Any

import numpy as np
import torch
from full import BATCH, RUNS, variant
from recipe import ALL_THREE, trials
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, diags
from torch import Tensor
from trials import NONE, RESULTS, STEPS, Trial, append, read

from unbraid.evaluation.ground_truth import absolute_cosines
from unbraid.randomness import generator
from unbraid.sae import SAE
from unbraid.synthetic import World, build_world
from unbraid.synthetic.learning import train_on_world

METHODS = {
    "small": ("batch_topk", "recipe", ALL_THREE),
    "medium": ("batch_topk", "recipe", ALL_THREE),
    "full": (ALL_THREE, "batch_topk", "recipe"),
}
SAMPLES, TRAINED_SAMPLES = 131_072, 5_000_000
ROUNDS, FLOOR, POWER = 10, 0.3, 2.0
"""Of the robust fit: repetitions, and a token's weight (error / mean error + FLOOR) ** -POWER."""
SEED = 40


def fitted(codes: csr_matrix, x_TD: np.ndarray, rounds: int = 0) -> np.ndarray:
    """Rows that reconstruct `x_TD` from `codes`: least squares, and again with tokens weighed by their errors."""
    weights = np.ones(len(x_TD))
    rows = np.zeros((codes.shape[1], x_TD.shape[1]))
    for _ in range(rounds + 1):
        weighed = diags(weights) @ codes
        gram = np.asarray((codes.T @ weighed).todense(), dtype=np.float64)
        gram[np.diag_indices_from(gram)] += 1e-9 * gram.trace() / len(gram) + 1e-12
        rows = cho_solve(cho_factor(gram, overwrite_a=True), np.asarray(weighed.T @ x_TD, dtype=np.float64))
        errors = np.square(x_TD - codes @ rows).sum(1)
        weights = (errors / errors.mean() + FLOOR) ** -POWER
    return rows


def match(rows: np.ndarray | Tensor, world: World) -> tuple[np.ndarray, np.ndarray]:
    """The feature of each row in the one-to-one match of MCC, and its |cosine|."""
    cosines = absolute_cosines(torch.as_tensor(rows).float(), world.dictionary).numpy()
    _, features = linear_sum_assignment(1 - cosines)
    return features, cosines[np.arange(len(cosines)), features]


def trained(name: str, world: World) -> list[SAE]:
    """Each method on one seed."""
    if name == "full":
        steps, label = TRAINED_SAMPLES // BATCH, "-".join([*METHODS[name], str(TRAINED_SAMPLES), "1"])
        variants = [variant(method, steps, 1) for method in METHODS[name]]
        run = RUNS / f"full-{label}"
        return train_on_world(world, variants, TRAINED_SAMPLES, BATCH, checkpoints=run, checkpoint_every=100)
    given = {trial.method: trial for trial in trials(name, SEED)}
    chosen = [Trial("batch_topk", "batch_topk", NONE, SEED, world=name, sae={}), given["recipe"], given[ALL_THREE]]
    return train_on_world(world, [trial.settings for trial in chosen], STEPS * BATCH, BATCH)


def main() -> None:
    """Add the lines of a world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=METHODS)
    asked = parser.parse_args()
    world = build_world(asked.world)
    known = [line["trial"] for line in read("ceiling")]

    def note(method: str, rung: str, metrics: dict[str, Any]) -> None:
        trial = {"world": asked.world, "method": method, "rung": rung}
        if trial not in known:
            append(RESULTS / "ceiling.jsonl", {"trial": trial, "metrics": metrics})
            print(trial, metrics, flush=True)

    x_TD, truth = world.sample(SAMPLES, generator(SEED, "ceiling"))
    shape = (len(x_TD), world.n_features)
    codes = csr_matrix((truth.values.numpy(), truth.indices.numpy(), truth.offsets.numpy()), shape)
    x = (x_TD - world.bias).numpy()
    energy = np.asarray(codes.multiply(codes).sum(0)).ravel()
    saes = trained(asked.world, world)
    n = saes[0].n_features
    best = np.argsort(-energy)[:n]
    for rung, rounds in (("least squares", 0), ("robust", ROUNDS)):
        _, cosines = match(fitted(codes[:, best], x, rounds), world)
        note("the N strongest features", rung, {"mcc": float(cosines.mean())})
    parents = world.is_parent.numpy()
    for method, sae in zip(METHODS[asked.world], saes, strict=True):
        features, cosines = match(sae.W_dec, world)
        strong = np.isin(features, best)
        kinds = {"parents": parents[features], "leaves": ~parents[features]}
        spread = {f"lost_to_{name}": float((1 - cosines)[of].sum() / n) for name, of in kinds.items()}
        unmatched = cosines < 0.5
        note(
            method,
            "as trained",
            {
                "mcc": float(cosines.mean()),
                "lost_to_unmatched": float((1 - cosines)[unmatched].sum() / n),
                "unmatched": float(unmatched.mean()),
                "among_the_strongest": float(strong.mean()),
            }
            | spread,
        )
        with torch.no_grad():
            own = csr_matrix(np.concatenate([sae.encode(part).numpy() for part in x_TD.split(4096)]))
        refitted = fitted(own, x)
        at = absolute_cosines(torch.from_numpy(refitted).float(), world.dictionary).numpy()
        note(method, "own codes, least squares", {"mcc": float(at[np.arange(n), features].mean())})
        for rung, rounds in (("true codes, least squares", 0), ("true codes, robust", ROUNDS)):
            rows = fitted(codes[:, features], x, rounds)
            at = absolute_cosines(torch.from_numpy(rows).float(), world.dictionary).numpy()
            note(method, rung, {"mcc": float(at[np.arange(n), features].mean())})


if __name__ == "__main__":
    main()
