"""The process of a RolloutActor, as the driver sees it: where it is, and why it did not start."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import RayError

from toolrl_ray.errors import RolloutError, ToolRLError
from toolrl_ray.weights.client import what_it_raised

log = logging.getLogger(__name__)


def start_error(index: int, error: RayError) -> ToolRLError:
    """A person's mistake as it is; anything else in one line, with the remote traceback in the log."""
    if isinstance(cause := getattr(error, "cause", None), ToolRLError):
        return cause
    log.debug("RolloutActor %d: %s", index, error)
    return RolloutError(f"RolloutActor {index} could not load its engine: {what_it_raised(error)}")


def process_of(actor: Any) -> tuple[str, int] | None:
    """(node, process id), or None while it has no place in the cluster. The actor itself cannot be asked: it may hang."""
    state = ray._private.state.actors(actor._actor_id.hex())
    return (state["Address"]["NodeID"], state["Pid"]) if state.get("State") == "ALIVE" else None
