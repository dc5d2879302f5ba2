"""Faster arithmetic where the hardware has it: bfloat16 for the encoder's product, TF32 for every float32 product.

Weights, gradients and Adam's state stay float32 throughout. The encoder's product is by far the largest of a step; what
is selected from it is float32 again before anything is summed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def matrix_products(tf32: bool) -> Iterator[None]:
    """For a whole run: whether float32 matrix products may go by TF32 on GPUs that have it. Restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def encoder_autocast(precision: Literal["float32", "bfloat16"], device: torch.device) -> torch.autocast:
    """For one `training_forward` (not for its backward pass): bfloat16 where asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
