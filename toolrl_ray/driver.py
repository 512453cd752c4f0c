"""The loop of a run.

```
 tasks/        rollout                       driver                    learner
 Task -------> collect: generate <-> tool -> Trajectories ----------> update (algos/)
                  ^                                                      |
                  +------------------- weights.sync <--------------------+ policy_version n+1
```

Synchronous: one collection, one update, one weight sync, again. An evaluation after step s (`eval.every_steps`) takes no turn of its
own: its episodes ride along with the collection of step s+1, which the same policy version samples. Who waits for whom:

| waits | for | unblocked by |
|---|---|---|
| driver | rollout.collect | every episode finished; rollout.collect_timeout_s |
| an episode | its completion, its tool calls | the engine, the tool; episode.*_deadline_s |
| driver | learner.update | all ranks; learner.update_timeout_s |
| driver | weights.sync | pause, send, resume of every engine; weights.timeout_s each |

Shutdown: whatever ends the loop (the last step, an error, Ctrl-C, SIGTERM), `Parts.close` kills the actors, removes the run's
tools and its placement group, and `Run.close_tracker` then ends the W&B run, which may wait for a network; the files of the run
folder are whole up to the last finished step. The driver knows the parts by what they do, never how they do it: `cluster.py`
builds them on Ray, `in_process.py` builds them in this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from toolrl_ray.config import RunConfig
from toolrl_ray.evaluation import eval_requests, eval_result, rollout_metrics, speed
from toolrl_ray.recipe import dump
from toolrl_ray.tasks.module import load_tasks
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.tools.stats import isolations, tool_metrics
from toolrl_ray.tracking.memory import tree_gib
from toolrl_ray.tracking.metrics import MetricsWriter
from toolrl_ray.tracking.trajectories import TrajectoryWriter
from toolrl_ray.tracking.wandb_log import WandbTracker
from toolrl_ray.types import EpisodeRequest, Task, Trajectory

Say = Callable[[str], None]


class Rollout(Protocol):
    num_restarts: int
    num_rerun: int

    def collect(self, requests: list[EpisodeRequest], *, temperature: float, max_in_flight: int | None = None) -> list[Trajectory]: ...
    def tool_stats(self) -> dict[str, float]: ...


class Learner(Protocol):
    def update(self, trajectories: list[Trajectory]) -> dict[str, float]: ...
    def save_policy(self, directory: str, tokenizer_dir: str) -> None: ...


class Weights(Protocol):
    backend: str

    def sync(self, policy_version: int) -> dict[str, float]: ...


@dataclass
class Parts:
    """What a run is made of. learner and weights are None for an evaluation."""

    rollout: Rollout
    learner: Learner | None
    weights: Weights | None
    close: Callable[[], None]


def evaluate(
    config: RunConfig, parts: Parts, tasks: list[Task], label: str, *, num_samples: int, without_tools: bool = False
) -> tuple[dict[str, float], list[Trajectory]]:
    """An evaluation on its own: all its episodes (`evaluation.eval_requests`) in one collection. Its numbers, and the episodes."""
    requests = eval_requests(config.eval, tasks, label, num_samples=num_samples, without_tools=without_tools)
    started = time.monotonic()
    trajectories = parts.rollout.collect(requests, temperature=config.eval.temperature, max_in_flight=config.eval.max_in_flight)
    duration_s = time.monotonic() - started
    return eval_result(trajectories) | speed(trajectories, duration_s), trajectories


def requests_for(step: int, tasks: list[Task], group_size: int) -> list[EpisodeRequest]:
    return [
        EpisodeRequest(f"{step}:{row}:{member}", f"{step}:{row}", task) for row, task in enumerate(tasks) for member in range(group_size)
    ]


class Run:
    """One training run and its folder. Whoever calls `train` closes the parts, and then calls `close_tracker`."""

    def __init__(self, config: RunConfig, run_dir: Path, policy_dir: str, say: Say):
        self._config = config
        self._dir = run_dir
        self._policy_dir = policy_dir
        self._say = say
        self._tracker: WandbTracker | None = None
        self._evals: dict[str, Any] = {}
        self._tool_stats: dict[str, float] = {}  # after the step before
        self._totals = {"episodes": 0.0, "tokens": 0.0, "rollout_s": 0.0}

    def train(self, parts: Parts) -> dict[str, Any]:
        """The whole run; returns the summary that `tracking.summary.render` shows."""
        config = self._config
        assert parts.learner is not None and parts.weights is not None
        train_tasks, heldout = load_tasks(config.task)
        stream = TaskStream(train_tasks, config.seed)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._tool_stats = parts.rollout.tool_stats()
        isolation = isolations(self._tool_stats)
        found = "".join(f"# {tool} runs untrusted code under {tier}\n" for tool, tier in isolation.items())
        (self._dir / "config.yaml").write_text(found + dump(config))
        started = time.monotonic()
        self._tracker = tracker = WandbTracker(config, self._dir, {"isolation": isolation})
        self._say(tracker.note)
        with closing(TrajectoryWriter(self._dir)) as trajectories, closing(MetricsWriter(self._dir)) as metrics:
            self._evaluate(parts, heldout, "before", 0)
            for step in range(1, config.train.num_steps + 1):
                batch = stream.next_batch(config.train.tasks_per_step)
                collected, numbers = self._step(parts, step, batch, self._due(step - 1, heldout))
                trajectories.write(step, collected)
                metrics.write(step, numbers)
                tracker.log(step, numbers, collected)
            parts.learner.save_policy(str(self._dir / "policy"), self._policy_dir)  # an evaluation that fails costs no training
            self._evaluate(parts, heldout, "after", config.train.num_steps)
        return self._summary(time.monotonic() - started)

    def close_tracker(self) -> None:
        """Ends the W&B run, with every evaluation in its summary. Safe to call at any time, and twice."""
        if self._tracker:
            self._tracker.finish({f"eval/{label}/{key}": value for label, result in self._evals.items() for key, value in result.items()})

    def _due(self, step: int, heldout: list[Task]) -> list[EpisodeRequest]:
        """The episodes of the evaluation after this step; [] where none is scheduled."""
        every, num_samples = self._config.eval.every_steps, self._config.eval.num_samples or 0
        due = every and step > 0 and step % every == 0
        return eval_requests(self._config.eval, heldout, f"step-{step}", num_samples=num_samples) if due else []

    def _step(
        self, parts: Parts, step: int, tasks: list[Task], evaluation: list[EpisodeRequest]
    ) -> tuple[list[Trajectory], dict[str, Any]]:
        """evaluation: episodes of the evaluation after the step before, which ride along.

        The numbers are of training episodes alone, but for two: `time/rollout_s`, over which the rates are taken, is the time of both,
        and what the tool clients count (`tools/NAME/*`, `tools/client/*`) holds the calls of both.
        """
        config = self._config
        started = time.monotonic()
        requests = requests_for(step, tasks, config.train.group_size)
        finished = parts.rollout.collect([*requests, *evaluation], temperature=config.rollout.temperature)
        collect_s = time.monotonic() - started
        collected, evaluated = finished[: len(requests)], finished[len(requests) :]
        if evaluated:
            self._record_evaluation(f"step-{step - 1}", step - 1, eval_result(evaluated), evaluated)
        numbers: dict[str, Any] = rollout_metrics(collected, collect_s)
        numbers["rollout/eval_episodes"] = len(evaluated)
        numbers |= parts.learner.update(collected)
        numbers |= parts.weights.sync(step)
        stats = parts.rollout.tool_stats()
        numbers |= tool_metrics(stats, self._tool_stats)
        self._tool_stats = stats
        numbers |= {
            "rollout/actor_restarts": parts.rollout.num_restarts,
            "rollout/episodes_rerun": parts.rollout.num_rerun,
            "weights/backend": parts.weights.backend,
            "system/memory_gib": tree_gib(),
            "time/step_s": time.monotonic() - started,
        }
        self._totals["episodes"] += len(collected)
        self._totals["tokens"] += numbers["rollout/sampled_tokens"]
        self._totals["rollout_s"] += collect_s
        self._say(_step_line(step, config.train.num_steps, numbers))
        return collected, numbers

    def _evaluate(self, parts: Parts, heldout: list[Task], label: str, step: int) -> None:
        result, trajectories = evaluate(self._config, parts, heldout, label, num_samples=self._config.eval.num_samples or 0)
        self._tool_stats = parts.rollout.tool_stats()  # its calls are none of the next step's
        self._record_evaluation(label, step, result, trajectories)

    def _record_evaluation(self, label: str, step: int, result: dict[str, float], trajectories: list[Trajectory]) -> None:
        """In eval.json, the transcripts' file and W&B, as of `step`."""
        self._evals[label] = {"step": step, **result}
        (self._dir / "eval.json").write_text(json.dumps(self._evals, indent=1) + "\n")
        with closing(TrajectoryWriter(self._dir / "eval" / label)) as writer:
            writer.write(step, trajectories)
        assert self._tracker is not None
        self._tracker.log(step, {f"eval/{key}": value for key, value in result.items()})
        self._say(
            f"eval {label}: accuracy {result['accuracy']:.3f} ({result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}), "
            f"tool use {result['tool_use_rate']:.3f} on {result['num_tasks']} tasks"
        )

    def _summary(self, seconds: float) -> dict[str, Any]:
        def pair(result: dict[str, float]) -> dict[str, float]:
            return {"accuracy": result["accuracy"], "tool_use": result["tool_use_rate"]}

        rollout_s = self._totals["rollout_s"] or None
        return {
            "before": pair(self._evals["before"]),
            "after": pair(self._evals["after"]),
            "num_tasks": self._evals["after"]["num_tasks"],
            "episodes_per_s": self._totals["episodes"] / rollout_s if rollout_s else None,
            "tokens_per_s": self._totals["tokens"] / rollout_s if rollout_s else None,
            "time_s": seconds,
            "run_dir": str(self._dir),
        }


def _step_line(step: int, num_steps: int, numbers: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        value = numbers.get(key)
        return "-" if value is None else format(value, form)

    width = len(str(num_steps))
    return (
        f"step {step:{width}}/{num_steps}  reward {number('env/reward_mean', '.3f')}  tool use {number('env/tool_use_rate', '.3f')}  "
        f"kl {number('objective/kl', '.3f')}  mismatch kl {number('mismatch/kl', '.1e')}  "
        f"{number('rollout/tokens_per_s', ',.0f')} tok/s  {number('time/step_s', '.1f')} s"
    )
