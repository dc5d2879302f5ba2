"""Matryoshka-BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested prefixes of the features must each reconstruct.

The loss is the sum over prefixes of ||x - x_hat_prefix||^2. Prefix reconstructions are running sums of the shares of
consecutive feature groups, and the shares of all groups are one sparse product with B * G short rows instead of B.
"""

from unbraid.sae.batch_topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose first `matryoshka_widths` features reconstruct on their own."""

    architecture = "matryoshka"

    def prefix_widths(self) -> list[int]:
        """`matryoshka_widths`, or N/16, N/4, N, as far as they reach into the features held here."""
        widths, n = self.config.matryoshka_widths, self.config.n_features
        if widths is None:
            widths = [width for width in (n // 16, n // 4) if width > 0] + [n]
        return [self.shard.clamp(width) for width in widths]
