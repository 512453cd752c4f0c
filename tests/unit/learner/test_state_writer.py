"""A checkpoint that cannot be written is told of by its deadline, once, and leaves the next one to be written."""

from __future__ import annotations

import os

import pytest

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner.state import StateWriter


def test_a_write_that_hangs_is_told_of_at_its_deadline(tmp_path):
    os.mkfifo(tmp_path / "learner.json")  # as a file system that has stopped answering: opening it waits for a reader
    writer = StateWriter(timeout_s=0.2)
    writer.start(str(tmp_path), {"learner.json": "{}"})
    with pytest.raises(LearnerError, match=r"not written within 0.2 s \(learner.update_timeout_s\)"):
        writer.finish()
    with (tmp_path / "learner.json").open() as file:  # it answers again
        assert file.read() == "{}"
    later = tmp_path / "later"
    later.mkdir()
    writer.start(str(later), {"learner.json": "{}"})
    writer.finish()
    assert (later / "learner.json").read_text() == "{}"


def test_a_write_that_fails_is_told_of_once(tmp_path):
    writer = StateWriter(timeout_s=60)
    writer.start(str(tmp_path / "missing"), {"learner.json": "{}"})
    with pytest.raises(LearnerError, match="missing/learner.json could not be written .FileNotFoundError"):
        writer.finish()
    writer.finish()


def test_a_snapshot_waits_for_the_one_before(tmp_path):
    writer = StateWriter(timeout_s=60)
    writer.start(str(tmp_path / "missing"), {"learner.json": "1"})
    with pytest.raises(LearnerError, match="could not be written"):
        writer.start(str(tmp_path), {"learner.json": "2"})
    assert not (tmp_path / "learner.json").exists()
