"""SAEBench's own core evaluation takes our export through SAELens: `make test-saebench`."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from sae_samples import D, N, make_sae

from unbraid import formats

# Importing theirs warns about much; the one warning that matters is turned into an error below.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CONTEXT, CONTEXTS, BATCH, VOCABULARY = 20, 8, 4, 40


class Tokens:
    """The part of SAELens' ActivationsStore that the core evaluation reads."""

    context_size, store_batch_size_prompts = CONTEXT, BATCH

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.at = tokens, 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        self.at += n
        return self.tokens[self.at - n : self.at]

    def reset_input_dataset(self) -> None:
        self.at = 0


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jumprelu", "matryoshka", "gated"])
def test_saebench_evaluates_our_export_without_a_norm_warning(architecture: str, tmp_path: Path):
    pytest.importorskip("sae_bench", reason="SAEBench, from `make test-saebench`")
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    ours = make_sae(architecture)
    metadata = {"model_name": "tiny", "hook_name": "blocks.0.hook_resid_post", "context_size": CONTEXT}
    theirs = SAE.load_from_disk(str(formats.save(ours, tmp_path / "sae", metadata=metadata)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Decoder weights are not normalized")
        _, theirs, _ = load_and_format_sae("ours", theirs, "cpu")

    shape = {"n_layers": 1, "d_model": D, "n_ctx": CONTEXT, "d_head": 8, "n_heads": 2, "d_vocab": VOCABULARY}
    model = HookedTransformer(HookedTransformerConfig(**shape, act_fn="relu", normalization_type=None, seed=0)).eval()
    tokens = torch.randint(3, VOCABULARY, (CONTEXTS, CONTEXT))
    every = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    config = CoreEvalConfig(
        model_name="tiny",
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=CONTEXTS // BATCH,
        n_eval_sparsity_variance_batches=CONTEXTS // BATCH,
        context_size=CONTEXT,
        **{f"compute_{name}": True for name in every},
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, features = run_evals(theirs, Tokens(tokens), model, config)
    assert all(math.isfinite(value) for group in metrics.values() for value in group.values())
    _, cache = model.run_with_cache(tokens)
    f = ours.encode(cache["blocks.0.hook_resid_post"])
    assert metrics["sparsity"]["l0"] == pytest.approx(float((f != 0).sum(-1).double().mean()), rel=1e-5)
    assert metrics["sparsity"]["l1"] == pytest.approx(float(f.sum(-1).double().mean()), rel=1e-4)
    assert len(features["feature_density"]) == N
