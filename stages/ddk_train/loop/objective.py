"""The objective of a step: each domain's weights of cross-entropy, KL and policy gradient."""

from typing import NamedTuple

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_train.config import Schedule, TrainConfig
from ddk_train.loop.schedule import weight


class Weights(NamedTuple):
    """The weights of a step by domain, [N] each.

    A token's loss is cross_entropy * CE + gamma * KL + policy * the policy gradient's.
    """

    cross_entropy: list[float]
    gamma: list[float]
    policy: list[float]


def step_weights(config: TrainConfig, domains: tuple[str, ...], step: int) -> Weights:
    """Return the weights of ``step``, which counts from 1.

    With ``temperature_squared`` gamma has the factor T², which makes the size of the gradient independent of
    T (Hinton et al., arXiv 1503.02531); without it the loss is equation 3 of DDK (arXiv 2407.16154).
    """
    factor = config.temperature**2 if config.temperature_squared else 1.0
    return Weights(
        [config.of_domain(name, "cross_entropy_weight") for name in domains],
        [factor * weight(config.of_domain(name, "gamma"), step, config.max_steps) for name in domains],
        [config.of_domain(name, "policy_gradient_weight") for name in domains],
    )


def reads_targets(config: TrainConfig, domains: tuple[str, ...]) -> list[bool]:
    """Return whether each domain's gamma is ever above 0, [N], so that its targets are needed."""
    gammas = [config.of_domain(name, "gamma") for name in domains]
    return [(g.start, g.end) != (0, 0) if isinstance(g, Schedule) else g > 0 for g in gammas]


def reads_labels(config: TrainConfig, domains: tuple[str, ...]) -> list[bool]:
    """Return whether each domain has a policy gradient, [N], which needs the labels' log-probabilities."""
    return [config.of_domain(name, "policy_gradient_weight") > 0 for name in domains]


def check_objective(config: TrainConfig, cache: Cache) -> None:
    """Raise ConfigError if the objective does not fit the cache's domains or its target."""
    for name in config.domains:
        if name not in cache:
            raise ConfigError(
                f"domains.{name}: no such domain in the cache; its domains are {', '.join(cache.domains)}"
            )
    target, reads = cache.target, reads_targets(config, cache.domains)
    for name, has_kl, has_policy in zip(
        cache.domains, reads, reads_labels(config, cache.domains), strict=True
    ):
        if not (has_kl or has_policy) and config.of_domain(name, "cross_entropy_weight") == 0:
            raise ConfigError(
                f"domains.{name}: gamma, cross_entropy_weight and policy_gradient_weight are all 0, so "
                "nothing is learned from it; to leave a domain out use strategy: static and the weight 0"
            )
        if has_kl and not cache[name].train.has_targets:
            raise ConfigError(
                f"domains.{name}.gamma: must be 0: its cache has target kind label, the labels' log-"
                "probabilities alone, which are enough for policy_gradient_weight; KL needs topk or sampled"
            )
    if not any(reads):
        return
    if config.temperature != target.temperature:
        raise ConfigError(
            f"temperature: is {config.temperature}, but the cache's targets were made at "
            f"{target.temperature}; set it to that"
        )
    if config.divergence != "forward" and target.kind == "sampled":
        raise ConfigError(
            f"divergence: {config.divergence} needs target kind topk; with a sampled cache only forward is "
            "unbiased, because tokens that were not drawn have no probability there"
        )
