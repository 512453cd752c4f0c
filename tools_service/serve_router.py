"""How Serve chooses the replica of a request, for tools of several replicas: imported by Serve, from serve_app.py.

A call of a session names its home, the replica that holds the session, and goes there. Where the home is full or gone it goes to
another replica, which answers at once that it does not hold the session: so nothing waits behind a replica that is busy.

A session's home is drawn at random. Queue lengths would not do: those that a caller knows may be seconds old, and all sessions that are
opened meanwhile would live in one replica.
"""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

OPEN_SESSION = "open_session"  # ToolDeployment's method


class SessionRouter(RequestRouter):
    """Two random replicas, of which the one with the shorter queue is taken; with a `session_id`, that replica first; for a new session
    any that is not full."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        home = pending_request.metadata.session_id if pending_request else ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # between rounds in which every replica was full
            if pending_request.metadata.call_method == OPEN_SESSION:
                return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != home]
        at_home = [replica for replica in candidate_replicas if replica.replica_id.unique_id == home]
        ranks = [at_home, random.sample(others, min(2, len(others)))]
        return [rank for rank in ranks if rank]
