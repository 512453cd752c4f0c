"""Checkpoints of the learner in one process; tests/stack/test_learner_state.py has the DeepSpeed engine."""

from __future__ import annotations

import json
import os
import random
import threading

import numpy as np
import pytest
import torch
from learner_synthetic import random_trajectories, run_config, save_model
from safetensors.torch import load_file

from toolrl_ray.errors import LearnerError
from toolrl_ray.learner import state
from toolrl_ray.learner.update import Learner

# The learning rate and the KL coefficient differ from update to update, so that a counter that is not restored shows.
SECTIONS = {"learner": {"lr": 1e-3, "warmup_steps": 20}, "algo": {"target_kl": 1.0, "kl_horizon": 50}}
KINDS = {
    "gae": SECTIONS,
    "separate critic": SECTIONS | {"policy": {"separate_critic": True}},
    "lora": SECTIONS | {"policy": {"lora": {"rank": 4}}},
    "bfloat16": SECTIONS | {"policy": {"dtype": "bfloat16"}, "learner": SECTIONS["learner"] | {"zero_stage": 2}},
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


def learner(model: str, sections=SECTIONS) -> Learner:
    return Learner(run_config(**sections), model, in_process=True)


def update(x: Learner, seeds) -> list[dict[str, float]]:
    metrics = [x.update(random_trajectories(9, seed)) for seed in seeds]
    return [{key: value for key, value in m.items() if not key.startswith("time/")} for m in metrics]


def save(x: Learner, folder) -> None:
    folder.mkdir(exist_ok=True)
    x.save_state(str(folder))
    x.finish_save()


def saved(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (state.MODEL, state.OPTIMIZER, state.LEARNER)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_learner_goes_on_bit_for_bit_as_if_never_interrupted(kind, tied, folder, tmp_path):
    x = learner(tied, KINDS[kind])
    update(x, (0, 1))
    save(x, folder)
    want = update(x, (2, 3))
    save(x, tmp_path / "after")
    y = learner(tied, KINDS[kind])
    y.load_state(str(folder))
    assert (y.policy_version, y.num_updates, y.engine.num_steps) == (2, 2, 8)
    assert update(y, (2, 3)) == want
    save(y, tmp_path / "again")
    assert saved(tmp_path / "again") == saved(tmp_path / "after") != saved(folder)
    weights = [dict(one.named_weights()) for one in (x, y)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_learner_saved_before_its_first_update_starts_as_a_fresh_one(tied, folder):
    save(learner(tied), folder)
    x = learner(tied)
    update(x, (5,))
    x.load_state(str(folder))
    assert x.engine.lr == pytest.approx(1e-3 / 20)
    assert update(x, (0, 1)) == update(learner(tied), (0, 1))


def test_the_snapshot_is_of_when_it_was_taken_though_it_is_written_later(tied, folder, tmp_path, monkeypatch):
    x = learner(tied)
    update(x, (0,))
    save(x, tmp_path / "before")
    go = threading.Event()

    def late(*args, **kwargs):
        assert go.wait(60)
        write(*args, **kwargs)

    write = state.save_file
    monkeypatch.setattr(state, "save_file", late)
    x.save_state(str(folder))
    update(x, (1,))
    assert not (folder / state.MODEL).exists()
    go.set()
    x.finish_save()
    assert saved(folder) == saved(tmp_path / "before")


def test_whom_the_umask_lets_read_a_checkpoint_can_read_all_of_it(tied, folder):
    before = os.umask(0o027)
    try:
        save(learner(tied), folder)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(os.listdir(folder), 0o640)


def test_the_files_hold_whole_float32_tensors_under_module_names(tied, folder):
    x = learner(tied, KINDS["lora"])
    x.engine.module.register_buffer("seen", torch.tensor(3))
    update(x, (0,))
    save(x, folder)
    model, moments = load_file(folder / state.MODEL), load_file(folder / state.OPTIMIZER)
    trained = {name: p for name, p in x.engine.module.named_parameters() if p.requires_grad}
    assert set(model) == {*trained, "seen"} and {"value_head.weight", "value_head.bias"} < set(trained)
    assert all(torch.equal(model[name], p) and model[name].dtype == torch.float32 for name, p in trained.items())
    assert set(moments) == {f"{name}.{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq")}
    assert all(bool(moments[f"{name}.exp_avg_sq"].any()) for name in trained)
    numbers = json.loads((folder / state.LEARNER).read_text())
    assert {key: numbers[key] for key in state.COUNTS} == {"policy_version": 1, "num_updates": 1, "num_steps": 4, "adam_step": 4}
    x.engine.module.seen.zero_()
    x.load_state(str(folder))
    assert int(x.engine.module.seen) == 3


def draws() -> tuple:
    return random.gauss(0, 1), np.random.standard_normal(), float(torch.randn(()))


def test_the_random_number_generators_go_on_where_they_were(tied, folder):
    x = learner(tied)
    draws()  # leaves half a pair of normal draws in two of them
    save(x, folder)
    want = draws()
    x.load_state(str(folder))
    assert draws() == want
    (folder / "rng-0.json").unlink()  # another number of ranks
    x.load_state(str(folder))
    assert draws() != want


@pytest.mark.parametrize("name", [state.MODEL, state.OPTIMIZER, state.LEARNER, "rng-0.json"])
def test_a_checkpoint_with_a_file_cut_off_is_refused_in_one_line_and_changes_nothing(name, tied, folder, tmp_path):
    x = learner(tied)
    save(x, folder)
    update(x, (0,))
    save(x, tmp_path / "before")
    (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    with pytest.raises(LearnerError, match=rf"{name} cannot be read \(.*; go on from another checkpoint$") as refused:
        x.load_state(str(folder))
    assert "\n" not in str(refused.value)
    save(x, tmp_path / "after")
    assert saved(tmp_path / "after") == saved(tmp_path / "before")


def test_a_checkpoint_without_one_of_its_files_is_refused(tied, folder):
    x = learner(tied)
    save(x, folder)
    (folder / state.OPTIMIZER).unlink()
    with pytest.raises(LearnerError, match=f"{state.OPTIMIZER} cannot be read"):
        x.load_state(str(folder))


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"policy": {"lora": {"rank": 8}}}, r"lora_A.default.weight has shape \[4, 48\] there and shape \[8, 48\] in this one"),
        ({}, r"lm.model.embed_tokens.weight has none there and shape \[101, 48\] in this one"),
        ({"policy": {"lora": {"rank": 4}}, "algo": {"advantage": "reinforce_pp"}}, r"value_head.bias has shape \[1\] there and none in"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(sections, difference, tied, folder):
    save(learner(tied, KINDS["lora"]), folder)
    x = learner(tied, sections)
    with pytest.raises(LearnerError, match=difference) as refused:
        x.load_state(str(folder))
    assert str(folder / state.MODEL) in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).endswith("the settings (policy.*, algo.*) that the checkpoint was saved with")


def test_what_could_not_be_written_is_raised_once_by_finish_save(tied, folder):
    x = learner(tied)
    x.save_state(str(folder / "missing"))
    with pytest.raises(LearnerError, match="missing/rng-0.json could not be written .FileNotFoundError"):
        x.finish_save()
    x.finish_save()
    save(x, folder)
    x.load_state(str(folder))
