"""Which rows count: how heavy the tail of activation norms is, and what it does to the pairs that are selected.

    python study/rows.py norms     # shares of rows and of the squared norm beyond multiples of the median norm
    python study/rows.py pairs     # the most correlated 0.1 % of smollm2-demo's features, by which rows count

Both print a Markdown table for docs/method.md.
"""

import argparse

import torch
from torch import Tensor

import unbraid
from unbraid import recipes
from unbraid.activations.live import LiveActivations
from unbraid.config import overridden

SITES = {
    "smollm2": [*(f"resid_post.{layer}" for layer in (3, 8, 14, 22, 28)), "attn_out.8", "mlp_out.8", "mlp_out.22"],
    "gemma-3-270m": [*(f"resid_post.{layer}" for layer in (3, 8, 13)), "attn_out.8", "mlp_out.8"],
}
TOKENS = 20_000
MULTIPLES = (2, 3, 5, 10)
FRACTION, MIN_SUPPORT = 1e-3, 4


def norms_of(recipe: str) -> dict[str, Tensor]:
    """Site -> norms of held-out rows, without special tokens and first positions."""
    config, _ = overridden(recipes.RECIPES[recipe](), {"model.sites": SITES[recipe]})
    source = LiveActivations(config, torch.device("cpu"))
    special = torch.tensor(source.model.special_ids)
    found: dict[str, list[Tensor]] = {site: [] for site in SITES[recipe]}
    rows = 0
    for chunk in source.chunks(None, held_out=True):
        counted_BT = ~torch.isin(chunk.tokens_BT, special)
        counted_BT[:, 0] = False
        for site, x_BTD in zip(found, chunk.activations, strict=True):
            found[site].append(x_BTD.float().norm(dim=-1)[counted_BT])
        rows += int(counted_BT.sum())
        if rows >= TOKENS:
            break
    return {site: torch.cat(parts) for site, parts in found.items()}


def print_norms() -> None:
    """The table of norms."""
    print("| model, site |", *(f"beyond {m} medians: rows, squared norm |" for m in MULTIPLES))
    print("|---|" + "---|" * len(MULTIPLES))
    for recipe in SITES:
        for site, norm_R in norms_of(recipe).items():
            beyond = [norm_R > m * norm_R.median() for m in MULTIPLES]
            square_R = norm_R.square() / norm_R.square().sum()
            shares = [f"{100 * b.float().mean():.2f} %, {100 * square_R[b].sum():.0f} % |" for b in beyond]
            print(f"| {recipe}, `{site}` |", *shares)


def selected(f_RN: Tensor) -> tuple[set[tuple[int, int]], float, int]:
    """The most correlated pairs (Eq. 2), their mean, and how many features they are made of."""
    alive = ((f_RN > 0).sum(0) >= MIN_SUPPORT).nonzero()[:, 0]
    unit_RN = torch.nn.functional.normalize(f_RN[:, alive], dim=0)
    first, second = torch.triu_indices(len(alive), len(alive), 1)
    correlation_P = (unit_RN.T @ unit_RN)[first, second]
    top = correlation_P.topk(round(FRACTION * len(correlation_P)))
    ends = alive[torch.stack([first[top.indices], second[top.indices]], 1)]
    return set(map(tuple, ends.tolist())), float(top.values.mean()), len(ends.unique())


def print_pairs() -> None:
    """The table of pairs."""
    fm = unbraid.features("smollm2-demo")
    (name,) = fm.dictionaries
    codes, norms = [], []
    for row_T, length in zip(fm.held_out.seen.tokens_CT, fm.held_out.length_C, strict=True):
        reading = fm.read(torch.tensor(row_T[:length])[None])
        codes.append(reading.codes[name].to_dense()[reading.read_BT])
        norms.append(reading.norms[name][reading.read_BT])
    f_RN, norm_R = torch.cat(codes), torch.cat(norms)
    equal_RN = torch.nn.functional.normalize(f_RN, dim=1)
    near_R = [norm_R <= m * norm_R.median() for m in (10, 3)]
    cases = {
        "every row": f_RN,
        "rows up to 10 medians": f_RN[near_R[0]],
        "rows up to 3 medians": f_RN[near_R[1]],
        "every row, scaled to the same norm of codes": equal_RN,
        "rows up to 3 medians, scaled so": equal_RN[near_R[1]],
    }
    chosen = {case: selected(rows) for case, rows in cases.items()}
    reference, _, _ = chosen["rows up to 3 medians"]
    print("| rows that count | rows | mean correlation of S | features in S | pairs of S also selected at 3 medians |")
    print("|---|---|---|---|---|")
    for case, (pairs, mean, features) in chosen.items():
        shared = len(pairs & reference) / len(pairs)
        print(f"| {case} | {len(cases[case]):,} | {mean:.3f} | {features:,} | {100 * shared:.0f} % |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["norms", "pairs"])
    print_norms() if parser.parse_args().table == "norms" else print_pairs()
