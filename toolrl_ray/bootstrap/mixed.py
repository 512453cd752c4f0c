"""The warm start of one tiny policy for several tasks: rows of each, by weight."""

from __future__ import annotations

import random
from types import ModuleType

from toolrl_ray.bootstrap.rows import Demonstrations, Row
from toolrl_ray.config_task import TaskPart
from toolrl_ray.types import Task

SEPARATOR = "/"


class Mixed:
    """What rows.py asks of a module, over the modules of several tasks.

    modules: of every part, by its name. Keys are the part's own behind its name.
    """

    def __init__(self, parts: dict[str, TaskPart], modules: dict[str, ModuleType]):
        self._parts, self._modules = parts, modules
        self.PIECES = tuple(dict.fromkeys(piece for module in modules.values() for piece in module.PIECES))
        self.BUILT_ON = tuple(dict.fromkeys(source for module in modules.values() for source in (module, *module.BUILT_ON)))

    def key(self, task: Task) -> str:
        own_id = task.id.removeprefix(task.source + SEPARATOR)
        return task.source + SEPARATOR + self._modules[task.source].key(Task(own_id, task.prompt, task.answer, task.source, task.aliases))

    def Demonstrations(self, seed: int, tool_share: float, few_shot: int, heldout: frozenset[str]) -> Demonstrations:
        """few_shot is each part's own."""
        made = {}
        for name, module in self._modules.items():
            prefix = name + SEPARATOR
            own = frozenset(key.removeprefix(prefix) for key in heldout if key.startswith(prefix))
            made[name] = module.Demonstrations(seed, tool_share, self._parts[name].few_shot, own)
        return _MixedRows(seed, {name: part.weight for name, part in self._parts.items()}, made)


class _MixedRows:
    def __init__(self, seed: int, weights: dict[str, float], made: dict[str, Demonstrations]):
        self._rng = random.Random(f"mixed/{seed}")
        self._weights, self._made = list(weights.values()), [made[name] for name in weights]

    def _one(self) -> Demonstrations:
        return self._rng.choices(self._made, self._weights)[0]

    def demonstration(self) -> Row:
        return self._one().demonstration()

    def exercise(self) -> Row:
        return self._one().exercise()

    def drill(self) -> Row:
        return self._one().drill()
