"""How far one round of training can move the global parameters, from public numbers of the job alone. numpy only.

Example: the demo moves its 36,870 parameters by 18 a round; `federation.max_movement` = 0.5 allows 96.

The server shortens a mean that is longer (`shortened`), so an honest run never passes the bound; a site refuses
parameters that moved further (`site.states`). So a server cannot send parameters made to leak, and a site that lies
cannot drag the others along.

The bound is the least of these, all on the L2 norm over d parameters:

* What the job declares: max_movement * sqrt(d). Under masks also value_range * sqrt(d), where every number is cut off.
* Adam, where the number of steps T is public: it divides a mean of gradients by the root of a mean of their squares.
  With the weights a_i = (1-b1) b1^(t-i) / (1-b1^t) and b_i likewise of b2, Cauchy-Schwarz gives in step t for every
  parameter |sum a_i g_i| / sqrt(sum b_i g_i^2) <= K_t = sqrt(sum a_i^2 / b_i), whatever the gradients. A round moves
  by at most rate * sqrt(d) * sum_t K_t.
* SGD under differential privacy, where all that is released is clipped and noised as it stands (engine `exact`, or no
  contexts trained; else the noise goes through the text tower, whose slope is no public number). A gradient counts in
  all later steps: with momentum m, one that is k steps from the round's end moves by rate * c_k, c_k = 1 + ... +
  m^(k-1). With C the clip bound, s the noise multiplier, q the sampling rate and U the least declared units:
    signal  rate * sum(c_k) * C * B / (q U)       B units in a batch, at most: true units are taken to be at most twice
                                                  the declared, and a binomial passes its mean by Bernstein's bound
    noise   rate * sqrt(sum c_k^2) * s' / (q U) * (sqrt(d) + sqrt(2 L)),  s' = s C sqrt(groups) and its rounding
            the weighted sum of independent normals is one; the norm of d of them is Lipschitz, so it passes its mean,
            at most sqrt(d), by sqrt(2 L) with a probability of at most exp(-L) (Boucheron et al. 2013, theorem 5.6)
    decay   rate * weight_decay * sum(c_k) * (largest norm on the way), which is at most the first norm and the movement
* The server's own optimizer, where sites share the noise of a sum (`[server]`). Its gradient is as the one step of SGD
  above, with the noise of the fewest sites that a sum may hold; momentum m lets it count 1 / (1-m) times. Adam's bound
  holds as well, a step at a time.
  exp(-L) is `FAILURE` shared out among all sites, rounds and steps of a job, so in a whole job a mean is shortened by
  chance with a probability of at most 2e-9.

The mean of updates within a ball is within it, whatever the weights.
"""

from functools import lru_cache
from math import cos, exp, inf, log, pi, sqrt

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.shared_noise import largest_batch

FAILURE = 1e-9
MOST_SITES = 1000


def largest_movement(job: JobConfig, layout: ParameterLayout, round_number: int, norm: float) -> float:
    """Most that a round moves the global parameters.

    Args:
        job: the agreed job.
        layout: of the d trained parameters.
        round_number: from 1; sets the learning rate of the schedule. Of a round that an earlier run has trained, which
            the job continues, only what the job declares is known.
        norm: L2 norm of the parameters before the round.

    Returns:
        L2 norm, above 0, finite.
    """
    declared = job.federation.max_movement
    if job.privacy.distributed:
        return min(declared * sqrt(layout.size), _by_server(job, layout.size, round_number))
    if job.secagg.masked:
        declared = min(declared, job.secagg.value_range)
    if round_number < job.first_round:  # of the run that it continues, which had noise of its own
        return declared * sqrt(layout.size)
    contexts = any(name.startswith("contexts.") for name in layout.names)
    return min(declared * sqrt(layout.size), _by_optimizer(job, layout.size, round_number, norm, contexts))


def largest_change(job: JobConfig, layout: ParameterLayout, round_number: int, norm: float) -> float:
    """The same, with the averaging of the last rounds' parameters that ends a job which asks for it."""
    first = first_averaged(job) if round_number == job.training.rounds else round_number
    return sum(
        largest_movement(job, layout, number, norm) for number in range(min(first, round_number), round_number + 1)
    )


def first_averaged(job: JobConfig) -> int:
    """The first of the rounds whose parameters are averaged when the run ends; the last round for none."""
    return job.training.rounds - max(1, round(job.server.averaging * job.training.rounds)) + 1


def scheduled(rate: float, schedule: str, round_number: int, rounds: int) -> float:
    """A learning rate in a round (from 1) of `cosine` or `constant` schedule."""
    return rate * 0.5 * (1 + cos(pi * (round_number - 1) / rounds)) if schedule == "cosine" else rate


def shortened(
    update: np.ndarray, job: JobConfig, layout: ParameterLayout, round_number: int, state: np.ndarray
) -> np.ndarray:
    """A round's mean update, (d,) float64, brought back to the bound where it is beyond; `state` is (d,) before it."""
    largest = largest_movement(job, layout, round_number, float(np.linalg.norm(state.astype(np.float64))))
    length = float(np.linalg.norm(update))
    return update if length <= largest else update * (largest / length)


def _by_optimizer(job: JobConfig, size: int, round_number: int, norm: float, contexts: bool) -> float:
    training, privacy = job.training, job.privacy
    steps = job.steps_per_round if privacy.private else training.local_steps
    if steps is None:
        return inf  # they follow from the sites' records, which are nobody's business
    rate = training.learning_rate * max(1.0, *training.group_rates.values(), 1.0)
    rate = scheduled(rate, training.schedule, round_number, training.rounds)
    if training.optimizer == "adam":
        return rate * sqrt(size) * _adam_steps(training.momentum, 1, steps)
    released = privacy.engine == "exact" or not contexts
    if not privacy.private or not released or privacy.noise_multiplier is None:
        return inf
    plain, squared = _momentum_sums(training.momentum, steps)
    decay = rate * training.weight_decay * plain
    if decay >= 1:
        return inf
    signal, noise, grid = _largest_gradient(job, size, privacy.noise_multiplier, steps)
    return (rate * (plain * (signal + grid) + sqrt(squared) * noise) + decay * norm) / (1 - decay)


def _by_server(job: JobConfig, size: int, round_number: int) -> float:
    server, noise = job.server, job.privacy.noise_multiplier
    rate = server.learning_rate * max(1.0, *server.group_rates.values(), 1.0)
    rate = scheduled(rate, server.schedule, round_number, job.training.rounds)
    if server.optimizer == "adam":
        return rate * sqrt(size) * _adam_steps(server.momentum, round_number, round_number, server.beta2)
    if noise is None:
        return inf
    share = noise / sqrt(job.honest * job.federation.min_sites)  # the mean of so many sites, each with a share
    return rate / (1 - server.momentum) * sum(_largest_gradient(job, size, share, 1))


def _largest_gradient(job: JobConfig, size: int, noise: float, steps: int) -> tuple[float, float, float]:
    """Norms, at most, of a step's gradient over the public batch size: of its units, its noise, and their rounding."""
    privacy, expected = job.privacy, job.privacy.sample_rate * job.federation.min_units
    bounds = [*privacy.group_norms.values()] or [privacy.max_grad_norm]
    attempts = job.training.rounds + job.federation.max_failed_rounds
    tail = log(MOST_SITES * attempts * steps / FAILURE)
    batch = largest_batch(privacy.sample_rate, job.federation.min_units, exp(-tail))
    grid = max(bounds) * 2.0 ** -Mechanism.of(job).grid_bits * sqrt(size)
    std = noise * sqrt(len(bounds)) * (max(bounds) + grid)
    signal = sqrt(sum(bound**2 for bound in bounds)) * batch
    return signal / expected, std * (sqrt(size) + sqrt(2 * tail)) / expected, grid / expected


def _momentum_sums(momentum: float, steps: int) -> tuple[float, float]:
    """Sums of c_k and of c_k^2 over k = 1..steps, c_k = (1 - m^k) / (1 - m)."""
    rest = 1 - momentum
    once, twice = (momentum**n * (1 - momentum ** (n * steps)) / (1 - momentum**n) for n in (1, 2))
    return (steps - once) / rest, (steps - 2 * once + twice) / rest**2


@lru_cache(maxsize=16)
def _adam_steps(beta1: float, first: int, last: int, beta2: float = 0.999) -> float:
    """Sum of K_t over t = first..last."""
    t = np.arange(first, last + 1, dtype=np.float64)
    ratio = beta1**2 / beta2
    with np.errstate(over="ignore"):
        series = t if ratio == 1 else (ratio**t - 1) / (ratio - 1)
        return float(((1 - beta1) / (1 - beta1**t) * np.sqrt((1 - beta2**t) / (1 - beta2) * series)).sum())
