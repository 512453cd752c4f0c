"""What of an episode a reward looks at."""

from __future__ import annotations

from toolrl_ray.types import StopReason, Trajectory

THINK, THOUGHT = "<think>", "</think>"  # around a thought, of models that think first


def submission(trajectory: Trajectory) -> str | None:
    """The submitting turn's own text behind its thoughts, never what a tool wrote; None for an episode that did not submit."""
    if trajectory.stop_reason is not StopReason.SUBMITTED:
        return None
    return trajectory.final_text.rpartition(THOUGHT)[2].partition(THINK)[0]  # one that never closes holds no answer
