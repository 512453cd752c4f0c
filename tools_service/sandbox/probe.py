"""What each isolation can do on this machine, found out by attacking it."""

from __future__ import annotations

import asyncio
import threading

from tools_service.sandbox.limits import Limits
from tools_service.sandbox.outcome import IsolationUnavailable
from tools_service.sandbox.owner import Sandbox
from tools_service.sandbox.plan import TIERS

PROBE_S = 5.0


async def _probe_one(isolation: str) -> tuple[str, bool, str]:
    sandbox = Sandbox(Limits(wall_s=1.0, memory_bytes=64 << 20), preload=(), isolation=isolation, num_ahead=1)
    try:
        await sandbox._try_isolation(isolation)  # `start` would add to the reason what all isolations need
        return TIERS[isolation], True, "an attack on itself was held"
    except IsolationUnavailable as error:
        return TIERS[isolation], False, str(error)
    except Exception as error:  # a diagnosis must not end the program that asks for it
        return TIERS[isolation], False, f"{type(error).__name__}: {error}"
    finally:
        await sandbox.close()


async def _probe_all() -> list[tuple[str, bool, str]]:
    async def in_time(isolation: str) -> tuple[str, bool, str]:
        try:
            return await asyncio.wait_for(_probe_one(isolation), PROBE_S - 1)
        except TimeoutError:
            return TIERS[isolation], False, f"no answer within {PROBE_S - 1:.0f} s"

    return await asyncio.gather(*map(in_time, ("bubblewrap", "landlock", "seccomp")))


def probe() -> list[tuple[str, bool, str]]:
    """(tier, whether it holds here, detail), best first. Blocks for less than PROBE_S; never raises; fit for any thread."""
    found: list[tuple[str, bool, str]] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(_probe_all())), daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return found or [(TIERS[name], False, f"no answer within {PROBE_S:.0f} s") for name in ("bubblewrap", "landlock", "seccomp")]
