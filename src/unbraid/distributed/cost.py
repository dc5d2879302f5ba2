"""What scaling costs, on paper: bytes a step, and seconds and memory from FLOPs, bytes and link speed.

The byte formula counts payloads as `Ranks.payload` does, and is exact. The time model is the roofline of each part: the
larger of its arithmetic over the FLOP rate and its traffic over the bandwidth, one part after the other.
"""

from dataclasses import dataclass

from unbraid.distributed.shard import DIGIT_BITS

FLOAT, INT = 4, 8
HISTOGRAM = INT << DIGIT_BITS
"""Bytes of one digit's histogram."""


@dataclass(frozen=True)
class Job:
    """One SAE in training: a step's rows, model width, features, active features a row, sites read in a model pass."""

    rows: int
    width: int
    n_features: int
    k: int
    sites: int = 1
    model_parameters: int = 0
    """Of the language model up to the deepest site; 0 when training from a cache."""


@dataclass(frozen=True)
class Machine:
    """What one rank has."""

    flops: float
    """Multiply-adds count two; large products in training precision."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second in and out, to other ranks."""
    latency: float
    """Seconds of one exchange, however small."""
    pairs_per_second: float
    """Co-activations gone through in a second."""


def split_step_payload(job: Job, ranks: int, largest_slice: int, batch_top_k: bool = False) -> dict[str, int]:
    """Bytes a TopK or BatchTopK SAE split over `ranks` hands over in a step with per-batch decorrelation, no ties.

    Args:
        job: the shapes; every row has k active features.
        ranks: how many share the SAE.
        largest_slice: active entries of the batch on the rank that has most.
        batch_top_k: cut over the batch instead of row by row.
    """
    active = job.rows * job.k
    reconstruction = FLOAT * job.rows * job.width
    losses, revival, norm, bias = FLOAT, INT, INT, FLOAT * job.width
    selection = 2 * HISTOGRAM + 3 * INT
    gradient_of_codes = FLOAT * active + INT
    codes = INT * ranks + ranks * FLOAT * (job.rows + 2 * largest_slice)
    ties = INT * ranks
    total = reconstruction + losses + revival + norm + bias + selection + gradient_of_codes
    if batch_top_k:
        # Three digits find the cut, one entry is at it, and the smallest active value is the inference threshold.
        return {"sum": total + 3 * HISTOGRAM + FLOAT, "gather": codes + ties + 2 * INT * ranks}
    return {"sum": total, "gather": codes + ties + FLOAT * active * ranks}


def seconds_of_step(job: Job, ranks: int, machine: Machine) -> dict[str, float]:
    """Where the time of a step goes when every rank shares the model pass and one TopK SAE, its features split."""
    mine = job.n_features / ranks
    active = job.rows * job.k
    parameters = 2 * mine * job.width
    payload = split_step_payload(job, ranks, -(-active // ranks))
    wire = (2 * payload["sum"] * (ranks - 1) / ranks + payload["gather"] * (ranks - 1) / ranks) / machine.link_bandwidth
    rows_pooled = FLOAT * job.sites * job.rows * job.width * (ranks - 1) / ranks / machine.link_bandwidth
    product = 2 * job.rows * job.width * mine / machine.flops
    pre_activations = 2 * FLOAT * job.rows * mine / machine.memory_bandwidth
    entries = 5 * FLOAT * active * job.width / ranks / machine.memory_bandwidth
    # Read weight, gradient, two moments and the row again to renormalise; write all but the last; write the gradient.
    optimiser = 10 * FLOAT * parameters / machine.memory_bandwidth
    # The rank with the lowest features owns most pairs: 2 / ranks of all, less those within the others.
    share = (2 * ranks - 1) / ranks**2
    pairs = share * active * (job.k - 1) / 2 / machine.pairs_per_second
    exchanges = 0 if ranks == 1 else 14
    return {
        "model": 2 * job.model_parameters * job.rows / ranks / machine.flops,
        "activations": rows_pooled,
        "encoder": product + pre_activations,
        "entries": entries,
        "optimiser": optimiser,
        "decorrelation": pairs,
        "exchange": (wire if ranks > 1 else 0.0) + exchanges * machine.latency,
    }


def bytes_of_rank(job: Job, ranks: int) -> int:
    """Memory of a rank: weights, gradients, two moments, pre-activations and the batch."""
    mine = -(-job.n_features // ranks)
    return FLOAT * (4 * 2 * mine * job.width + job.rows * mine + 4 * job.rows * job.width)


def smallest_ranks(job: Job, memory: float, at_most: int = 1 << 20) -> int:
    """The smallest power of two of ranks on which the job fits into `memory` bytes each."""
    ranks = 1
    while bytes_of_rank(job, ranks) > memory and ranks < at_most:
        ranks *= 2
    return ranks
