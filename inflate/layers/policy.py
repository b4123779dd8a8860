"""What may be recomputed, by name; importable without torch, so that settings are checked at once."""

from typing import Literal, get_args

Policy = Literal["nothing", "feed_forward", "all_but_attention", "units", "nested"]
"""What of a unit the backward pass computes again: see `inflate.training.memory_settings`."""

POLICIES: tuple[Policy, ...] = get_args(Policy)
"""All of them, from the one that keeps most to the one that keeps least at once."""

WHOLE = POLICIES[2:]
"""Those that recompute units, which then keep their inputs."""
