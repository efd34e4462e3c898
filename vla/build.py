"""From names and numbers to modules: the only place that knows which class a baseline's name stands for."""

from __future__ import annotations

from dataclasses import asdict, fields
from importlib import import_module
from typing import Any

from data.normalization import ActionNormalizer, ActionStatistics
from vla.config import InverseDynamicsConfig
from vla.errors import UserError
from vla.inverse_dynamics import InverseDynamics
from vla.policy import Policy
from vla.policy_configs import POLICIES, IdeasConfig, StringConfig

BASELINES = tuple(POLICIES)
IDEAS = tuple(field.name for field in fields(IdeasConfig))


def policy_class(name: str) -> type[Policy]:
    """vla.baselines.<name>, named as its schema without "Config"."""
    if name not in POLICIES:
        raise UserError(f"baseline {name!r} is not known; choose one of {', '.join(BASELINES)}")
    return getattr(import_module(f"vla.baselines.{name}"), POLICIES[name].__name__.removesuffix("Config"))


def build_policy(name: str, statistics: ActionStatistics, normalization: str, arguments: dict[str, Any]) -> Policy:
    """A policy of baseline `name`; `arguments` are those of its `build`, and what IDEAS names."""
    policy = policy_class(name).build(ActionNormalizer(statistics, normalization), **of_build(arguments))
    return apply_ideas(policy, arguments)


def of_build(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's policy arguments that a baseline's own `build` takes."""
    return {key: value for key, value in arguments.items() if key not in IDEAS}


def apply_ideas(policy: Policy, arguments: dict[str, Any]) -> Policy:
    """GenVLA's changes to a policy that has its weights: what `arguments` switch on and it has not yet.

    Raises:
        UserError: a value that is not known, or a baseline that cannot have it.
    """
    actions = arguments.get("actions", "native")
    if actions not in ("native", "string"):
        raise UserError(f"policy.actions={actions} is not known; choose native or string")
    if arguments.get("dual") and not policy.dual:
        policy.make_dual()
    if (arguments.get("speaks") or actions == "string") and not policy.speaks:
        policy.make_speaking(arguments.get("language_head", "tied"))
    if actions == "string":
        from vla.string_policy import StringPolicy  # and with it every baseline

        if not isinstance(policy, StringPolicy):
            policy = StringPolicy(policy, StringConfig(**arguments["string"]))
    return policy


def build_inverse_dynamics(policy: Policy, cfg: InverseDynamicsConfig) -> InverseDynamics | None:
    """The auxiliary head for this policy's tap, or None when the ablation has none.

    Raises:
        UserError: an unknown reverse_space, or a tap with no trainable parameter behind it.
    """
    if not cfg.enabled:
        return None
    if cfg.reverse_space not in ("physical", "normalised"):
        raise UserError(
            f"inverse_dynamics.reverse_space={cfg.reverse_space} is not known; choose physical or normalised"
        )
    if not any(p.requires_grad for module in policy.vision_modules() for p in module.parameters()):
        raise UserError(
            f"inverse_dynamics.tap={cfg.tap} has no trainable parameter behind it; train the vision encoder"
        )
    tokens, channels = policy.tap_shape()
    arguments = {k: v for k, v in asdict(cfg).items() if k not in ("enabled", "tap")}
    return InverseDynamics(tokens, channels, policy.chunk, policy.normalizer, **arguments)
