"""Matryoshka-BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested prefixes of the features must each reconstruct.

The loss is the sum over prefixes of ||x - x_hat_prefix||^2. Prefix reconstructions are running sums of the shares of
consecutive feature groups, and the shares of all groups are one sparse product with B * G short rows instead of B.
"""

from unbraid.sae.batch_topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose first `matryoshka_widths` features reconstruct on their own."""

    architecture = "matryoshka"

    def prefix_widths(self) -> list[int]:
        """`matryoshka_widths`, or N/16, N/4, N."""
        if self.config.matryoshka_widths is not None:
            return self.config.matryoshka_widths
        n = self.n_features
        return [width for width in (n // 16, n // 4) if width > 0] + [n]
