"""FR3E: First Return, Entropy-Eliciting Explore, in JAX. What a notebook needs is in `fr3e_jax.library`."""

import importlib
from typing import Any

# Name -> where it is defined. Read when it is first asked for, since jax and transformers take seconds.
PUBLIC = {
    **dict.fromkeys(("Model", "states", "judge", "groups"), "fr3e_jax.library"),
    "modulated_advantage": "fr3e_jax.algorithm.credit",
    **dict.fromkeys(("Config", "ConfigError", "LossConfig", "OptimizerConfig"), "fr3e_jax.config"),
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
