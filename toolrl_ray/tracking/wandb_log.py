"""W&B: configuration, metrics and a table of transcripts. Offline unless the person is logged in.

Tracking never stops a run: without wandb, without a login, without a network, or when wandb itself fails, the run goes on
and `WandbTracker.note` says in one line what happened. Nothing here ever prompts. Files go into the run folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from toolrl_ray.config import RunConfig
from toolrl_ray.home import home
from toolrl_ray.run_dir import write_whole
from toolrl_ray.types import SegmentKind, Trajectory

Mode = Literal["off", "offline", "online"]
INIT_TIMEOUT_S = 30.0
ID_FILE = "wandb_id"  # in the run folder
MAX_CELL = 8000  # characters; wandb warns on the terminal of cells of 100,000 bytes and more
COLUMNS = ["step", "task", "prompt", "transcript", "answer", "reward", "stop_reason", "tool_calls"]

logger = logging.getLogger(__name__)


def logged_in() -> bool:
    """Whether wandb would find credentials: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named, folder = os.environ.get("NETRC"), home()
    own = [folder / ".netrc", folder / "_netrc"] if folder else []
    for path in [Path(named)] if named else own:
        try:
            if netrc.netrc(path).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def resolve_mode(asked: Literal["auto", "offline", "online", "off"]) -> tuple[Mode, str]:
    """The mode to run in, and why it is not what was asked for ("" when it is). `auto` follows WANDB_MODE where it is set."""
    if asked == "auto":
        environment = os.environ.get("WANDB_MODE", "")
        if environment in ("disabled", "offline"):
            asked = "offline" if environment == "offline" else "off"
    if asked == "off":
        return "off", ""
    if importlib.util.find_spec("wandb") is None:
        return "off", "wandb is not installed (pip install wandb)"
    if asked == "offline" or logged_in():
        return ("offline" if asked == "offline" else "online"), ""
    return "offline", "not logged in (wandb login)"


class WandbTracker:
    """One W&B run, which a run that is resumed goes on with. `note` is one line for the terminal: the mode, where the files or the page
    are, and why.
    found: what the run found out about the machine, for the run's configuration on W&B."""

    def __init__(self, config: RunConfig, run_dir: Path, found: Mapping[str, Any] | None = None):
        self._run: Any = None
        self._found = dict(found or {})
        self._num_transcripts = config.tracking.num_transcripts
        self.mode, reason = resolve_mode(config.tracking.wandb)
        if self.mode == "online" and not self._start(config, run_dir, "online"):
            self.mode, reason = "offline", f"W&B could not be reached: {self._failure}"
        if self.mode == "offline" and not self._start(config, run_dir, "offline"):
            self.mode, reason = "off", f"wandb failed to start: {self._failure}"
        self.note = "W&B: " + self._describe() + (f"; {reason}" if reason else "")

    def _start(self, config: RunConfig, run_dir: Path, mode: Mode) -> bool:
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it advertises itself where a model's or a tool's library is loaded
        try:
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S, login_timeout=1)
            self._run = wandb.init(
                project=config.tracking.wandb_project,
                id=run_id(run_dir),
                resume="allow",
                name=run_dir.name,
                tags=config.tracking.wandb_tags,
                dir=str(run_dir),
                config=config.model_dump(mode="json") | self._found,
                mode=mode,
                settings=settings,
            )
        except Exception as error:  # whatever wandb raises, a run must not end for the lack of its tracking
            logger.debug("wandb.init(mode=%s) failed", mode, exc_info=True)  # the note says why in one line
            self._failure = _one_line(error)
            with contextlib.suppress(Exception, SystemExit):  # a NameError where wandb cannot be imported
                wandb.teardown()  # else the id stays taken in wandb's own process, and a second try could not have it
            return False
        return True

    def _describe(self) -> str:
        if self.mode == "off":
            return "off"
        if self.mode == "online":
            return f"online at {self._run.url}"
        parts = Path(self._run.dir).parents[1].glob("offline-run-*")  # one of every start, in their order
        return f"offline; to upload: wandb sync {' '.join(sorted(map(str, parts)))}"

    def log(self, step: int, metrics: Mapping[str, Any], trajectories: Sequence[Trajectory] = ()) -> None:
        """One step: its metrics, and the first `tracking.num_transcripts` of its trajectories as a table.

        A step before the newest that W&B has, which a resumed run does again, is left out: W&B takes none.
        """
        if self._run is None:
            return
        import wandb

        try:
            if step < self._run.step:
                return
            data = dict(metrics)
            if rows := [transcript_row(step, trajectory) for trajectory in trajectories[: self._num_transcripts]]:
                data["transcripts"] = wandb.Table(columns=COLUMNS, data=rows)
            self._run.log(data, step=step)
        except Exception as error:  # see _start
            self._give_up("log", error)

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Ends the W&B run; `summary` appears as the run's summary values. Safe to call twice."""
        if self._run is None:
            return
        try:
            self._run.summary.update(dict(summary or {}))
            self._run.finish()
        except Exception as error:  # see _start
            self._give_up("finish", error)
        self._run = None

    def _give_up(self, what: str, error: Exception) -> None:
        logger.warning("W&B: %s failed, no more is sent: %s", what, _one_line(error))
        self._run, self.mode = None, "off"


def run_id(run_dir: Path) -> str:
    """The id of the folder's W&B run, made at the first call. Offline, each start has files of its own, which `wandb sync` joins by it."""
    path = run_dir / ID_FILE
    if not path.exists():
        write_whole(path, secrets.token_hex(4))
    return path.read_text()


def transcript_row(step: int, trajectory: Trajectory) -> list[Any]:
    """One row of the table of transcripts, in the order of COLUMNS. A long text is cut; trajectories.jsonl has it whole."""
    prompt = "".join(segment.text for segment in trajectory.segments if segment.kind is SegmentKind.PROMPT)
    transcript = "".join(segment.text for segment in trajectory.segments if segment.kind is not SegmentKind.PROMPT)
    calls = "\n".join(f"{call.tool}({call.argument}) -> {call.status}: {call.text}" for call in trajectory.tool_calls)
    task = trajectory.request.task
    row = [step, task.id, prompt, transcript, task.answer, trajectory.reward, str(trajectory.stop_reason), calls]
    return [_cut(cell) if isinstance(cell, str) else cell for cell in row]


def _cut(text: str) -> str:
    """Its beginning and its end."""
    if len(text) <= MAX_CELL:
        return text
    half = MAX_CELL // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are left out here ...]\n{text[-half:]}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
