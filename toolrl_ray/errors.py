"""The error tree. Every error carries its message as its only argument, so that it pickles and crosses Ray unchanged.

`UserError` and its children mean "the input or the machine is wrong": the command prints their message as one line and
exits with code 2. Everything else is a defect or a failure of a part, and keeps its traceback.
"""


class ToolRLError(Exception):
    """Root of the project's errors."""


class UserError(ToolRLError):
    """What a person asked for cannot be done; the message says what, where, the value and the remedy."""


class ConfigError(UserError):
    """An unknown recipe or key, a value out of range, or two keys that contradict each other."""


class MissingDependency(UserError):
    """A package or program is not installed; the message holds the install line."""


class PlacementError(UserError):
    """The machine or cluster cannot hold the plan; the message lists each missing resource."""


class EpisodeError(ToolRLError):
    """The harness failed while it ran an episode (never used for what a tool or the policy did)."""


class LedgerError(EpisodeError):
    """An operation would have broken an invariant of the token ledger."""


class RolloutError(ToolRLError):
    """Collection failed: an engine is gone for good or a deadline passed."""


class NotLoaded(RolloutError):
    """A RolloutActor's process has not loaded its engine: it has taken the place of one that died."""


class StreamError(ToolRLError):
    """A promise of the stream between rollout and learner was broken."""


class StallError(ToolRLError):
    """Nothing moved for train.stall_timeout_s; the message says who waits for whom."""


class LearnerError(ToolRLError):
    """A LearnerActor failed or a deadline of the learner passed."""


class LearnerLost(LearnerError):
    """A learner rank died or does not answer: the group has to be started anew."""


class WeightSyncError(ToolRLError):
    """A phase of the weight sync failed or ran past its deadline; the message names rank and phase."""
