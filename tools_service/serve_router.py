"""How Serve chooses the replica of a request, for tools of several replicas: imported by Serve, from serve_app.py.

A call of a session names its home, the replica that holds the session, and goes nowhere else: where the home is full it waits there, as
long as its caller does. Where the home is gone it goes to another replica, which answers at once that it does not hold the session.

A session's home is drawn at random. Queue lengths would not do: those that a caller knows may be seconds old, and all sessions that are
opened meanwhile would live in one replica.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

OPEN_SESSION = "open_session"  # ToolDeployment's method
ASK_AGAIN_S = 0.1  # after which a full replica is asked again whether it has room


class SessionRouter(RequestRouter):
    """Two random replicas, of which the one with the shorter queue is taken; with a `session_id`, that replica; for a new session any
    that is not full."""

    # Requests that look for a replica at the same time. Serve's own two per replica could all be waiting for one full home, and hold up
    # the calls of every other.
    max_num_routing_tasks = 4096

    def initialize_state(self, **kwargs: Any) -> None:
        self._asked: dict[str, float] = {}  # full replicas -> when one was last asked

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        home, opens = "", False
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # between rounds in which every replica was full
            home, opens = pending_request.metadata.session_id, pending_request.metadata.call_method == OPEN_SESSION
        if at_home := [replica for replica in candidate_replicas if replica.replica_id.unique_id == home]:
            ranks = [at_home]
        elif opens:
            ranks = [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]
        else:
            ranks = [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranks = [[replica for replica in rank if self._may_have_room(replica)] for rank in ranks]
        return [rank for rank in ranks if rank]

    def _may_have_room(self, replica: RunningReplica) -> bool:
        """Serve asks a replica that it knows to be full, once for every request that waits: here one asks for them all."""
        if self.select_available_replicas([replica]):
            return True
        name, now = replica.replica_id.unique_id, time.monotonic()
        if now - self._asked.get(name, 0.0) < ASK_AGAIN_S:
            return False
        self._asked[name] = now
        return True
