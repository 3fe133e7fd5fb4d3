"""What makes a backward unusual while it is in force. Lists, which autograd's own threads see too."""

from __future__ import annotations

from typing import Any

deferrals: list[Any] = []
"""The blocks of `defer_weight_grads` that are open."""

accumulating: list[Any] = []
"""The steps of `micro_batches` that are under way in exact mode."""

main_grads: list[None] = []
"""An entry for each `use_main_grads` so far: without any, backwards need not look."""
