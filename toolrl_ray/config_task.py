"""The configuration of the tasks: which problems, from where, and how many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tools_service.config import Section


def _absolute(path: str) -> str:
    """Files are named absolutely, because the processes that read them have folders of their own."""
    return str(Path(os.path.expanduser(path)).absolute())


class TaskSource(Section):
    """Which problems. `module` names the task itself: an importable module or a .py file, see tasks/module.py. `generated` ones are made
    from the seed; those of `gsm8k` and `triviaqa` come from `path`, local data in the form that the module tells, or else from the Hub."""

    module: str = "toolrl_ray.tasks.calculator"
    source: Literal["generated", "gsm8k", "triviaqa"] = "generated"
    path: str | None = Field(None, min_length=1)
    num_train: int = Field(4096, ge=1)  # of data that is read, at most: all where there are fewer
    num_heldout: int = Field(500, ge=1)
    few_shot: int = Field(0, ge=0, le=4)
    reward: str = Field("reward", min_length=1)  # the function of the module that scores an episode
    seed: int = 0

    @field_validator("module")
    @classmethod
    def _file_or_name(cls, value: str) -> str:
        return _absolute(value) if "/" in value or value.endswith(".py") else value

    @field_validator("path")
    @classmethod
    def _absolute_path(cls, value: str | None) -> str | None:
        return None if value is None else _absolute(value)

    @model_validator(mode="after")
    def _path_only_for_files(self) -> TaskSource:
        if self.path is not None and self.source == "generated" and self.module == "toolrl_ray.tasks.calculator":
            raise ValueError(f"task.path={self.path!r} contradicts task.source='generated', which reads no file; set task.source=gsm8k")
        return self


class TaskPart(TaskSource):
    """One task of several. weight: its share of the tasks, training and held-out alike, beside the weights of the others."""

    weight: float = Field(1.0, gt=0, le=1e9)


class TaskConfig(TaskSource):
    """One task, or several in one run (`parts`, by name), of which num_train and num_heldout are then the sums; see tasks/mixed.py."""

    parts: dict[str, TaskPart] = {}

    @model_validator(mode="after")
    def _parts_or_one(self) -> TaskConfig:
        for key in ("module", "source", "path", "few_shot", "reward", "seed"):
            if self.parts and (value := getattr(self, key)) != TaskSource.model_fields[key].default:
                raise ValueError(f"task.{key}={value!r} contradicts task.parts: set it in a part, or take one of them away")
        for name, part in self.parts.items():
            for key in ("num_train", "num_heldout"):
                if (value := getattr(part, key)) != TaskSource.model_fields[key].default:
                    raise ValueError(f"task.parts.{name}.{key}={value} contradicts task.{key}: a part has its share by its weight")
        return self
