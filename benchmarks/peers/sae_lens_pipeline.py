"""sae-lens from text to trained SAEs, through its ActivationsStore and trainers: one site, or several in one pass."""

import json
import sys

import datasets
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import get_special_token_ids
from turns import Turns

NORM_BATCHES = 4
settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
torch.manual_seed(0)
turns = Turns(settings["answers"])
hooks = [f"model.layers.{layer}" for layer in settings["layers"]]
model = load_model("AutoModelForCausalLM", settings["model"], device="cpu", hook_names=hooks)
store = ActivationsStore.from_config_multi_hook(
    model=model,
    dataset=datasets.Dataset.from_parquet(settings["text"]),
    hook_names=hooks,
    hook_d_ins=dict.fromkeys(hooks, settings["d_in"]),
    streaming=False,
    context_size=settings["context_length"],
    n_batches_in_buffer=settings["buffer_contexts"],
    total_training_tokens=0,
    store_batch_size_prompts=settings["batch_contexts"],
    train_batch_size_tokens=settings["batch"],
    seqpos_slice=(1, None),
    exclude_special_tokens=torch.tensor(get_special_token_ids(model.tokenizer)),
)


def clocked(part, function):
    def call(*arguments, **keywords):
        with turns.clock(part):
            return function(*arguments, **keywords)

    return call


store.get_batch_tokens = clocked("model", store.get_batch_tokens)
store.get_activations = clocked("model", store.get_activations)
store.get_multi_hook_activations = clocked("model", store.get_multi_hook_activations)


class Paced:
    """Batches, each handed out when the referee says so: whoever asks for another has finished a step.

    The first NORM_BATCHES are for the estimate of the norm, the one after them is for the first step.
    """

    def __init__(self, batches):
        self.batches, self.asked = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        if self.asked > NORM_BATCHES + 1:
            turns.step()
        with turns.clock("feed"):
            return next(self.batches)


def make_sae():
    shared = {
        "d_in": settings["d_in"],
        "d_sae": settings["n_features"],
        "device": "cpu",
        "normalize_activations": "expected_average_only_in",
    }
    if settings["architecture"] == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=settings["k"], **shared))
    l1 = settings["lambda1"] * settings["d_in"] ** 0.5
    return sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(l1_coefficient=l1, **shared))


config = SAETrainerConfig(
    total_training_samples=10**9,
    train_batch_size_samples=settings["batch"],
    lr=settings["lr"],
    lr_end=settings["lr"],
    device="cpu",
    n_batches_for_norm_estimate=NORM_BATCHES,
)
if len(hooks) == 1:
    trainer = sae_lens.SAETrainer(cfg=config, sae=make_sae(), data_provider=Paced(store))
else:
    trainer = MultiSAETrainer(
        cfg=config,
        saes={hook: make_sae() for hook in hooks},
        hook_names={hook: hook for hook in hooks},
        data_provider=Paced(store.get_multi_hook_data_loader()),
    )
turns.step()
trainer.fit()
