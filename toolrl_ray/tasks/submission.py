"""What of an episode a reward looks at."""

from __future__ import annotations

from toolrl_ray.types import StopReason, Trajectory

THOUGHT = "</think>"  # how models that think first end a thought


def submission(trajectory: Trajectory) -> str | None:
    """The submitting turn's own text behind its thoughts, never what a tool wrote; None for an episode that did not submit."""
    if trajectory.stop_reason is not StopReason.SUBMITTED:
        return None
    return trajectory.final_text.rpartition(THOUGHT)[2]
