"""What every test shares: shapes checked at run time, one thread a worker, no network, caches out of the way.

The environment is set before torch or a Hugging Face library is imported, because they read it only then.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("HF_HOME", str(ROOT / "cache" / "huggingface"))

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("unbraid", "beartype.beartype")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on CPU tensors; Triton reads it when it is imported

from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# The same examples every time, and no deadline: a test that times is a test that fails on a busy machine.
settings.register_profile(
    "unbraid", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unbraid")
