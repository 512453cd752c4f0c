"""Checkpoints of the DeepSpeed learner: exact on the same ranks and ZeRO stage, and free to change both and the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learner_ranks import free_address
from learner_state_ranks import AFTER, BEFORE, CROSS, SAVED, resume, state_config, state_main, update
from learner_synthetic import save_model
from safetensors.torch import load_file

from toolrl_ray.learner import state
from toolrl_ray.learner.update import Learner

MOVED = [(source, f"stage{stage}-ranks{num}") for num in CROSS for source, stage in CROSS[num]] + [("float32-3", "in_process")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that `state_main` fills, and "plain" in it, the same of plain PyTorch."""
    out = tmp_path_factory.mktemp("state")
    model = save_model(out / "model")
    torch.set_num_threads(1)
    plain = Learner(state_config("float32"), model, in_process=True)
    update(plain, BEFORE, out / "plain/saved")
    update(plain, AFTER, out / "plain/after")
    for world_size in (2, 1):
        torch.multiprocessing.spawn(state_main, (world_size, free_address(), model, str(out)), nprocs=world_size)
    resume(Learner(state_config("float32"), model, in_process=True), out / "float32-3/saved", out / "float32-3/in_process")
    return out


def same_files(a: Path, b: Path) -> bool:
    """To the byte, but for the random number generators."""
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (state.MODEL, state.OPTIMIZER, state.LEARNER))


def metrics(folder: Path, rank: int = 0) -> list[dict[str, float]]:
    return json.loads((folder / f"metrics-{rank}.json").read_text())


@pytest.mark.parametrize(("kind", "stage"), SAVED)
def test_a_learner_restored_on_the_same_ranks_goes_on_bit_for_bit(kind, stage, out):
    folder = out / f"{kind}-{stage}"
    assert same_files(folder / "again", folder / "saved")
    assert same_files(folder / "resumed", folder / "after")
    assert not same_files(folder / "resumed", folder / "saved")
    for rank in (0, 1):
        assert metrics(folder / "resumed", rank) == metrics(folder / "after", rank)


@pytest.mark.parametrize(("source", "where"), MOVED)
def test_a_checkpoint_moves_to_other_ranks_stages_and_engines_unchanged(source, where, out):
    assert same_files(out / source / where / "again", out / source / "saved")


@pytest.mark.parametrize(("source", "where"), [(source, where) for source, where in MOVED if source.startswith(("plain", "float32"))])
def test_a_learner_restored_elsewhere_goes_on_alike(source, where, out):
    want, got = out / source / "after", out / source / where / "resumed"
    for a, b in zip(metrics(got), metrics(want), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    weights, moments, before = (
        load_file(want / state.MODEL),
        load_file(want / state.OPTIMIZER),
        load_file(out / source / "saved" / state.MODEL),
    )
    found, found_moments = load_file(got / state.MODEL), load_file(got / state.OPTIMIZER)
    num_compared = 0
    for name, weight in weights.items():
        clear = moments[f"{name}.exp_avg_sq"].sqrt() > 1e-6  # of the others AdamW makes rounding noise, see NoiseWatch
        num_compared += int(clear.sum())
        assert torch.where(clear, (found[name] - weight).abs(), 0.0).max() < 1e-5, name
    assert num_compared > 0.95 * sum(weight.numel() for weight in weights.values())
    assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 1e-3
    assert max(float((found_moments[key] - moments[key]).abs().max()) for key in moments) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_keeps_the_float32_weights_that_half_precision_cannot_hold(stage, out):
    weights = load_file(out / f"bfloat16-{stage}" / "saved" / state.MODEL)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert not any(torch.equal(weight, weight.bfloat16().float()) for name, weight in weights.items() if name.startswith("lm."))


def test_all_engines_save_the_same_names(out):
    for name in (state.MODEL, state.OPTIMIZER):
        keys = {folder: set(load_file(out / folder / "saved" / name)) for folder in ("plain", *(f"float32-{stage}" for stage in range(4)))}
        assert all(found == keys["plain"] for found in keys.values())
    assert sorted(path.name for path in (out / "float32-3/saved").glob("rng-*")) == ["rng-0.json", "rng-1.json"]
