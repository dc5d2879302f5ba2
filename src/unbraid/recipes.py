"""Named settings, each with the reason for what it changes from the defaults of `config`.

A recipe is a function that returns a `RunConfig`; change it with `config.model_copy`, or on the command line with
`unbraid train RECIPE --group.setting VALUE`.
"""

from collections.abc import Callable

from unbraid.config import (
    BufferConfig,
    DecorrelationConfig,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TextConfig,
    TrainingConfig,
)

WITH_TWIN = {"decorrelated": {}, "twin": {"decorrelation.lambda2": 0.0}}
"""Each SAE beside a twin that differs in nothing but lambda2 = 0: a controlled comparison in one pass."""

SPARING = {"window": 4, "refresh": 64, "interval": 4, "max_pairs_per_feature": 2}
"""Decorrelation settings that cost a few per cent of a step in code space: pairs chosen every 64 steps, on four
batches, at most two a feature, penalised every fourth step with weight 4; `docs/method.md` has the figures."""

SPARING_ROWS = {"space": "decoder", "refresh": 64, "interval": 4, "max_pairs_per_feature": 2, "scan_rows": 512}
"""The same in decoder space, from lists of neighbours that are as old; they give what every step gives."""


def tiny() -> RunConfig:
    """A whole run in seconds, on a random two-layer model and generated text: for tests and for trying things out.

    Encoders start at full length as in `demo`, because a hundred steps are few for codes to become sparse in.
    """
    return RunConfig(
        name="tiny",
        text=TextConfig(source="generated", context_length=32),
        model=ModelConfig(name="random:llama", sites=["resid_post.0", "resid_post.1"], batch_contexts=16),
        buffer=BufferConfig(contexts=64),
        sae=SAEConfig(n_features=128, lambda1=0.04, decoder_init_norm=1.0, dead_after_tokens=10_000),
        optimiser=OptimiserConfig(lr=3e-3, warmup_steps=10),
        training=TrainingConfig(
            tokens=25_600, batch_tokens=256, log_every=5, checkpoint_every=50, held_out_tokens=2_048, threads=1
        ),
        variants=WITH_TWIN,
    )


def demo() -> RunConfig:
    """Three forms of one SAE on SmolLM2-135M, at equal sparsity, from one pass, in minutes on two CPU cores.

    Matryoshka SAEs with k = 32 on the residual stream after block 3: the form the study recommends, the paper's
    penalty, and no penalty. A top-k architecture holds L0 equal, so that what differs is the penalty. One shallow site
    instead of several deep ones, because what makes features readable is tokens, and the model gives 4,000 of them a
    second here. The buffer is small so that the first step comes soon. As many dead features as there are live ones per
    token explain the residual: at this learning rate, with more of them, features die faster than they are revived.
    """
    return RunConfig(
        name="demo",
        model=ModelConfig(sites=["resid_post.3"]),
        buffer=BufferConfig(contexts=256),
        sae=SAEConfig(architecture="matryoshka", n_features=4608, k=32, aux_k=32, dead_after_tokens=10_240),
        decorrelation=DecorrelationConfig(
            space="decoder", fraction=1e-3, push="rarer", floor="0.6 chance", scan_rows=128
        ),
        optimiser=OptimiserConfig(lr=2e-3, warmup_steps=50),
        training=TrainingConfig(
            tokens=700_000, batch_tokens=1024, log_every=10, checkpoint_every=50, held_out_tokens=16_384
        ),
        variants={
            "decorrelated": {},
            "paper": {"decorrelation.space": "codes"},
            "twin": {"decorrelation.lambda2": 0.0},
        },
    )


def transcoder_demo() -> RunConfig:
    """What one MLP of SmolLM2-135M computes, as sparse features, in minutes on two CPU cores.

    BatchTopK transcoders with k = 32 from what the MLP of block 3 reads to what it adds to the stream, with a skip
    connection and without one. They can be put in the MLP's place, and export to circuit-tracer.
    """
    return RunConfig(
        name="transcoder-demo",
        model=ModelConfig(sites=["mlp_in.3 -> mlp_out.3"]),
        buffer=BufferConfig(contexts=256),
        sae=SAEConfig(architecture="batch_topk", n_features=2304, k=32),
        decorrelation=DecorrelationConfig(method="none"),
        optimiser=OptimiserConfig(lr=1e-3, warmup_steps=50),
        training=TrainingConfig(
            tokens=800_000, batch_tokens=1024, log_every=10, checkpoint_every=200, held_out_tokens=16_384
        ),
        variants={"plain": {}, "skip": {"sae.skip": True}},
    )


def smollm2() -> RunConfig:
    """The paper's relative depths (5, 12, 19 of 26 -> 6, 14, 22 of 30) and constants on SmolLM2-135M."""
    return RunConfig(
        name="smollm2",
        model=ModelConfig(sites=["resid_post.6", "resid_post.14", "resid_post.22"]),
        sae=SAEConfig(n_features=4608),
        optimiser=OptimiserConfig(sparsity_warmup_steps=1000),
        training=TrainingConfig(tokens=4_000_000),
        variants=WITH_TWIN,
    )


def gemma_3_270m() -> RunConfig:
    """The paper's family, relative depths (5, 12, 19 of 26 -> 3, 8, 13 of 18) and constants on Gemma 3 270M.

    `make gemma` installs the model. 5,120 features are eight times its width, as in `smollm2`.
    """
    return RunConfig(
        name="gemma-3-270m",
        model=ModelConfig(name="packaged:gemma3", sites=["resid_post.3", "resid_post.8", "resid_post.13"]),
        sae=SAEConfig(n_features=5120),
        optimiser=OptimiserConfig(sparsity_warmup_steps=1000),
        training=TrainingConfig(tokens=4_000_000),
        variants=WITH_TWIN,
    )


def gemma_2_2b() -> RunConfig:
    """The paper's own configuration: google/gemma-2-2b at layers 5, 12, 19, the Pile streamed, every constant it gives.

    The paper gives neither a width nor lambda2: 16,384 features is the width published SAEs of this model share.
    """
    return RunConfig(
        name="gemma-2-2b",
        text=TextConfig(source="hub", dataset="monology/pile-uncopyrighted"),
        model=ModelConfig(
            name="google/gemma-2-2b", dtype="bfloat16", sites=["resid_post.5", "resid_post.12", "resid_post.19"]
        ),
        sae=SAEConfig(n_features=16_384),
        training=TrainingConfig(tokens=100_000_000),
        variants=WITH_TWIN,
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "demo": demo,
    "transcoder-demo": transcoder_demo,
    "smollm2": smollm2,
    "gemma-3-270m": gemma_3_270m,
    "gemma-2-2b": gemma_2_2b,
}
