"""The loop of a run.

```
 tasks/          rollout                      stream/                       learner
 Task ---------> generate <-> tool --------> Trajectories ---- batch ----> update (algos/)
   ^               ^      collector: polls       ^                            |
   | numbers       |                             | slots released             | policy_version n+1
   +-- stream -----+--------- weights.take, load <--- once loaded ------------+
```

Update s + 1 starts from the weights of version s and may train on episodes that began up to `stream.max_staleness_steps` versions before
(stream/buffer.py has the proof). With 0 it is: one collection, one update, one weight sync, again. With more, episodes go on beside
update and sync, and take the new weights up in mid-episode; and update s + 1 may begin while the engines load the weights of update s
(weights/sync.py says where). An evaluation after step s (`eval.every_steps`) takes no turn of its own: its episodes ride along with the
collection of batch s + 1, and that update waits for them, so version s alone samples them. Who waits for whom:

| waits | for | unblocked by |
|---|---|---|
| main thread | the next batch, in `Collector.batch` | complete groups; train.stall_timeout_s |
| main thread | the update, in `Collector.beside`; a load, in `finish_loading` | their threads; train.stall_timeout_s |
| an episode | its completion, its tool calls | the engine, the tool; episode.*_deadline_s |
| an episode that has not begun | a slot of the stream | the next weights, once the engines have them |
| the thread of a job | learner.update | all ranks; learner.update_timeout_s |
| the thread of a job | weights: pack or send, load | learner ranks; pause, update, resume of every engine; weights.timeout_s each |
| the job of a load | the load before it | the same |
| a replaced engine | the weights | the end of the update and load under way |

A lost learner (LearnerLost) is started anew and the run goes back to its last checkpoint, by the same path as `toolrl train --resume`;
where it takes none, it ends rather than begin again behind steps that were finished.
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
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from toolrl_ray import origin
from toolrl_ray import run_dir as files
from toolrl_ray.checkpoint import CheckpointStore, committed_steps, remove
from toolrl_ray.collector import Collector, evaluate, in_thread
from toolrl_ray.config import RunConfig
from toolrl_ray.errors import LearnerLost, UserError
from toolrl_ray.evaluation import eval_requests, eval_result, rollout_metrics
from toolrl_ray.parts import Parts
from toolrl_ray.recipe import dump
from toolrl_ray.stream.buffer import Stream
from toolrl_ray.tasks.module import load_tasks
from toolrl_ray.tasks.stream import TaskStream
from toolrl_ray.tools.stats import isolations, tool_metrics
from toolrl_ray.tracking.memory import tree_gib
from toolrl_ray.tracking.metrics import MetricsWriter
from toolrl_ray.tracking.summary import step_line
from toolrl_ray.tracking.trajectories import TrajectoryWriter
from toolrl_ray.tracking.wandb_log import WandbTracker
from toolrl_ray.types import EpisodeRequest, Task, Trajectory

Say = Callable[[str], None]
STATE = "run.json"  # in a checkpoint: what of the run is neither the learner's nor a file of the run folder


class Run:
    """One training run and its folder. Whoever calls `train` closes the parts, and then calls `close_tracker`.

    resume: the folder is that of a run that was interrupted; it goes on from its newest whole checkpoint, or from the beginning.
    """

    def __init__(self, config: RunConfig, run_dir: Path, policy_dir: str, say: Say, *, resume: bool = False):
        self._config = config
        self._dir = run_dir
        self._policy_dir = policy_dir
        self._say = say
        self._goes_on = resume
        self._store = CheckpointStore(run_dir, config.checkpoint.keep_last, say)
        self._saving: int | None = None  # step of the checkpoint that is being written
        self._is_lost, self._num_lost = False, 0  # the learner now; learners since the last checkpoint
        self._tracker: WandbTracker | None = None
        self._origin: dict[str, str] = {}
        self._evals: dict[str, Any] = {}
        self._tool_stats: dict[str, float] = {}  # after the step before, with 0 for what an earlier process counted
        self._totals = {"episodes": 0.0, "tokens": 0.0, "rollout_s": 0.0}

    def train(self, parts: Parts) -> dict[str, Any]:
        """The whole run; returns the summary that `tracking.summary.render` shows."""
        config = self._config
        assert parts.learner is not None and parts.weights is not None
        tasks, heldout = load_tasks(config.task)
        self._origin = origin.of_task_modules(config) | origin.of_heldout(heldout)  # as they were loaded, whatever becomes of their files
        started = time.monotonic()
        while True:
            try:
                stream = self._restored(parts, tasks)
                if self._tracker is None:
                    self._begin(isolations(parts.rollout.tool_stats()))
                self._train_from(parts, stream, heldout)
                return self._summary(time.monotonic() - started)
            except LearnerLost as error:
                self._num_lost += 1
                if files.lost_without_checkpoint(self._dir, config) or self._num_lost > config.train.max_learner_restarts:
                    raise
                self._say(f"{error}; starting the learner again ({self._num_lost} of {config.train.max_learner_restarts})")
                self._goes_on = self._is_lost = True
                self._saving = None

    def _begin(self, isolation: dict[str, str]) -> None:
        """What a run that is gone on with overwrites in its folder: only once nothing has refused to."""
        self._dir.mkdir(parents=True, exist_ok=True)
        found = "".join(f"# {tool} runs untrusted code under {tier}\n" for tool, tier in isolation.items())
        files.write_whole(self._dir / "config.yaml", found + dump(self._config))
        self._tracker = WandbTracker(self._config, self._dir, {"isolation": isolation})
        self._say(self._tracker.note)

    def close_tracker(self) -> None:
        """Ends the W&B run, with every evaluation in its summary. Safe to call at any time, and twice."""
        if self._tracker:
            self._tracker.finish({f"eval/{label}/{key}": value for label, result in self._evals.items() for key, value in result.items()})

    def _restored(self, parts: Parts, tasks: list[Task]) -> Stream:
        """Learner, engines, files and stream as they were at the newest whole checkpoint, or at the beginning."""
        config = self._config
        stream = Stream(
            config.stream,
            TaskStream(tasks, config.seed),
            groups_per_batch=config.train.tasks_per_step,
            group_size=config.train.group_size,
            num_batches=config.train.num_steps,
        )
        self._origin |= origin.of_policy(self._policy_dir)  # a learner that is started anew loads it again
        if not self._goes_on:
            return stream
        parts.rollout.cancel_all()
        if self._is_lost:
            parts.learner.restart()
            parts.weights.reconnect()
            self._is_lost = False
        step, num_bytes = 0, {}
        if (newest := self._store.newest()) is not None:
            step, folder = newest
            state = json.loads((folder / STATE).read_text())
            origin.check(state.get("origin", {}), self._origin)
            parts.learner.load_state(str(folder))
            stream.load_state_dict(state["stream"])
            self._totals, num_bytes = state["totals"], state.get("num_bytes", {})
            self._tool_stats = dict.fromkeys(state.get("tool_stats", ()), 0.0)
        elif committed_steps(self._dir):
            where = self._dir / "checkpoints"
            raise UserError(f"none of the checkpoints in {where} is whole; to begin again remove that folder and metrics.jsonl")
        files.truncate_to(self._dir, step)  # before a learner can be lost: `lost_without_checkpoint` judges rows by this run's settings
        parts.weights.sync(step)
        evals = self._dir / "eval.json"
        self._evals = json.loads(evals.read_text()) if (step or self._evals) and evals.exists() else {}
        self._say(f"going on after step {step}" if step else "no checkpoint yet: starting from the beginning")
        for line in files.lacking(self._dir, num_bytes):
            self._say(line)
        return stream

    def _train_from(self, parts: Parts, stream: Stream, heldout: list[Task]) -> None:
        config = self._config
        with closing(TrajectoryWriter(self._dir)) as trajectories, closing(MetricsWriter(self._dir)) as metrics:
            if stream.num_handed == 0 and "before" not in self._evals:
                self._evaluate(parts, heldout, "before", 0)
            self._tool_stats |= parts.rollout.tool_stats()
            collector = Collector(parts.rollout, stream, config.train.stall_timeout_s, self._say)
            self._rollout_from = 0.0  # when a step's episodes could begin, where that was before the step
            while (step := stream.num_handed + 1) <= config.train.num_steps:
                batch, numbers = self._step(parts, stream, collector, trajectories, self._due(step - 1, heldout))
                metrics.write(step, numbers)
                self._tracker.log(step, numbers, batch)
                if files.has_checkpoint(self._config, step):
                    ledger = stream.state_dict()  # here, where no other prompt can be admitted meanwhile
                    begin = partial(self._begin_checkpoint, parts, step, ledger, (trajectories, metrics))
                    collector.beside("a checkpoint's snapshot", begin)
            self._finish_checkpoint(parts)
            parts.learner.save_policy(str(self._dir / "policy"), self._policy_dir)  # an evaluation that fails costs no training
            collector.finish_loading()
            self._evaluate(parts, heldout, "after", stream.num_handed)

    def _due(self, step: int, heldout: list[Task]) -> list[EpisodeRequest]:
        """The episodes of the evaluation after this step; [] where none is scheduled."""
        every, num_samples, label = self._config.eval.every_steps, self._config.eval.num_samples or 0, f"step-{step}"
        due = every and step > 0 and step % every == 0 and label not in self._evals
        return eval_requests(self._config.eval, heldout, label, num_samples=num_samples) if due else []

    def _step(
        self, parts: Parts, stream: Stream, collector: Collector, trajectories: TrajectoryWriter, evaluation: list[EpisodeRequest]
    ) -> tuple[list[Trajectory], dict[str, Any]]:
        """evaluation: episodes of the evaluation after the step before, which ride along.

        The numbers are of training episodes alone, but for `time/rollout_s`, over which the rates are taken, and what the tool clients
        count (`tools/NAME/*`, `tools/client/*`): these are of both.
        """
        started, idle_before = time.monotonic(), collector.idle_s
        if evaluation:
            collector.finish_loading()  # of version step - 1, which alone is to sample them
        collector.evaluate(evaluation)
        batch, evaluated = collector.batch()
        step, waited_s = stream.num_handed, time.monotonic() - (self._rollout_from or started)
        if evaluated:
            self._record_evaluation(f"step-{step - 1}", step - 1, eval_result(evaluated), evaluated)
        written = in_thread(partial(trajectories.write, step, batch))  # a lot, for which the learner need not wait
        update_at = time.monotonic()
        learned, load = collector.beside("the update", partial(self._learn, parts, step, batch))
        update_s = time.monotonic() - update_at
        collector.load(step, load)
        if not self._config.stream.max_staleness_steps:
            collector.finish_loading()
            self._rollout_from = time.monotonic() if parts.rollout.concurrent else 0.0
        collector.wait("the trajectories' file", written)
        if self._saving is not None:
            collector.beside("the last checkpoint", partial(self._finish_checkpoint, parts))
        step_s = time.monotonic() - started
        idle_s = collector.idle_s - idle_before
        rollout_s = step_s if self._config.stream.max_staleness_steps else waited_s  # one that runs ahead runs all the time
        numbers = rollout_metrics(batch, rollout_s, stream.dropped_episodes) | learned | collector.load_numbers | stream.metrics()
        stats = parts.rollout.tool_stats()
        numbers |= tool_metrics(stats, self._tool_stats)
        self._tool_stats |= stats
        numbers |= {
            "rollout/eval_episodes": len(evaluated),
            "rollout/in_flight_episodes": parts.rollout.num_outstanding,
            "rollout/actor_restarts": parts.rollout.num_restarts,
            "rollout/episodes_rerun": parts.rollout.num_rerun,
            "stream/staleness_mean": fmean(stream.staleness),
            "stream/staleness_max": max(stream.staleness),
            "weights/backend": parts.weights.backend,
            "system/memory_gib": tree_gib(),
            "time/rollout_idle_share": min(1.0, idle_s / step_s),
            "time/learner_idle_share": 1 - update_s / step_s,
            "time/step_s": step_s,
        }
        counted = {"episodes": numbers["rollout/episodes"], "tokens": numbers["rollout/sampled_tokens"], "rollout_s": rollout_s}
        self._totals = {name: total + counted[name] for name, total in self._totals.items()}
        self._say(step_line(step, self._config.train.num_steps, numbers))
        return batch, numbers

    def _learn(self, parts: Parts, step: int, batch: list[Trajectory]) -> tuple[dict[str, float], Callable[[], dict[str, float]]]:
        """What the update tells, and the job that brings its weights to the engines."""
        with parts.weights.changing:
            return parts.learner.update(batch), parts.weights.take(step)

    def _begin_checkpoint(
        self, parts: Parts, step: int, ledger: dict[str, Any], written: tuple[TrajectoryWriter | MetricsWriter, ...]
    ) -> None:
        """Of the step that has just ended, whose rows it vouches for. The learner writes while it is already at the next update."""
        folder = self._store.begin(step)
        num_bytes = {file.path.name: file.sync() for file in written}
        state = {"stream": ledger, "totals": self._totals, "num_bytes": num_bytes, "origin": self._origin}
        (folder / STATE).write_text(json.dumps(state | {"tool_stats": list(self._tool_stats)}))
        with parts.weights.changing:  # a collective, as a sync is: all ranks must take the two in one order
            parts.learner.save_state(str(folder))
        self._saving = step

    def _finish_checkpoint(self, parts: Parts) -> None:
        if self._saving is not None:
            with parts.weights.changing:
                parts.learner.finish_save()
            self._store.commit(self._saving, self._evals.get(f"step-{self._saving}", {}).get("accuracy"))
            self._saving, self._num_lost = None, 0

    def _evaluate(self, parts: Parts, heldout: list[Task], label: str, step: int) -> None:
        num_samples = self._config.eval.num_samples or 0
        result, trajectories = evaluate(self._config, parts.rollout, heldout, label, num_samples=num_samples)
        self._store.rescore(step, result["accuracy"])  # first: with `after` in eval.json the run is finished
        self._store.clear(step)
        self._record_evaluation(label, step, result, trajectories)

    def _record_evaluation(self, label: str, step: int, result: dict[str, float], trajectories: list[Trajectory]) -> None:
        """In eval.json, the transcripts' file and W&B, as of `step`."""
        self._evals[label] = {"step": step, **result}
        remove(self._dir / "eval" / label)  # of an attempt that was given up: the writer appends
        with closing(TrajectoryWriter(self._dir / "eval" / label)) as writer:
            writer.write(step, trajectories)
        files.write_whole(self._dir / "eval.json", json.dumps(self._evals, indent=1) + "\n")
        self._tracker.log(step, {f"eval/{key}": value for key, value in result.items()})
        self._say(
            f"eval {label}: accuracy {result['accuracy']:.3f} ({result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}), "
            f"tool use {result['tool_use_rate']:.3f} on {result['num_tasks']} tasks"
        )

    def _summary(self, seconds: float) -> dict[str, Any]:
        rollout_s = self._totals["rollout_s"] or None
        pairs = {label: {"accuracy": e["accuracy"], "tool_use": e["tool_use_rate"]} for label, e in self._evals.items()}
        return {
            "before": pairs.get("before"),  # not there where eval.json was removed
            "after": pairs["after"],
            "num_tasks": self._evals["after"]["num_tasks"],
            "episodes_per_s": self._totals["episodes"] / rollout_s if rollout_s else None,
            "tokens_per_s": self._totals["tokens"] / rollout_s if rollout_s else None,
            "time_s": seconds,
            "run_dir": str(self._dir),
        }
