"""A mistake in a recipe or an override is one line: what is wrong, the value, what is allowed or what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.complaints import complaint
from toolrl_ray import config
from toolrl_ray import recipe as recipes
from toolrl_ray.errors import ConfigError
from toolrl_ray.weights.sync import select_backend, shares_gpu


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text("train: {num_steps: 3}\n")
    return str(path)


def test_a_recipe_is_its_file_over_the_defaults(recipe: str) -> None:
    loaded = recipes.load(recipe)
    assert loaded.recipe == "small"
    assert loaded.train.num_steps == 3
    assert loaded.train.tasks_per_step == config.TrainConfig().tasks_per_step


@pytest.mark.parametrize("override", ["learner.lr=.inf", "algo.ratio_band=[.nan, 2]", "episode.turn_deadline_s=1e400", "algo.kl_coef=.nan"])
def test_numbers_are_finite(recipe: str, override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}.*: input should be a finite number$"):
        recipes.load(recipe, [override])


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.num_steps=7", lambda c: c.train.num_steps, 7),
        ("learner.lr=1e-3", lambda c: c.learner.lr, 1e-3),
        ("learner.lr=3.5E-4", lambda c: c.learner.lr, 3.5e-4),
        ("algo.whiten_advantages=false", lambda c: c.algo.whiten_advantages, False),
        ("algo.target_kl=null", lambda c: c.algo.target_kl, None),
        ("policy.lora.rank=8", lambda c: (c.policy.lora.rank, c.policy.lora.target_modules), (8, "all-linear")),
        ("policy.lora={}", lambda c: (c.policy.lora.rank, c.policy.lora.alpha), (16, 32)),
        ("learner.adam_betas=[0.8, 0.9]", lambda c: c.learner.adam_betas, (0.8, 0.9)),
        ("tools.names=[A, B]", lambda c: c.tools.names, ["A", "B"]),
        ("policy.path=org/name", lambda c: c.policy.path, "org/name"),
        ('policy.path="1e3"', lambda c: c.policy.path, "1e3"),
        ("run_dir=nan", lambda c: c.run_dir, "nan"),
        ("tracking.wandb=off", lambda c: c.tracking.wandb, "off"),
        ("run_dir=runs/a=b", lambda c: c.run_dir, "runs/a=b"),
        ("run_dir=2026-02-28", lambda c: c.run_dir, "2026-02-28"),
        ("policy.path=2026-02-30", lambda c: c.policy.path, "2026-02-30"),
        ("run_dir=010", lambda c: c.run_dir, "010"),
        ("run_dir=1:30", lambda c: c.run_dir, "1:30"),
        ("train.num_steps=0x10", lambda c: c.train.num_steps, 16),
        ("train.num_steps=1_000", lambda c: c.train.num_steps, 1000),
        ("algo.kl_coef=0", lambda c: c.algo.kl_coef, 0.0),
    ],
)
def test_an_override_sets_its_key(recipe: str, override: str, read, value) -> None:
    assert read(recipes.load(recipe, [override])) == value


def test_the_last_override_of_a_key_holds(recipe: str) -> None:
    assert recipes.load(recipe, ["train.num_steps=1", "train.num_steps=2"]).train.num_steps == 2


def test_an_unknown_recipe_is_named_with_those_that_exist() -> None:
    message = complaint("calculater")
    assert "'calculater'" in message
    assert all(name in message for name in recipes.recipe_names())
    assert ".yaml" in message


def test_an_unknown_key_is_named_with_its_value_and_the_allowed_keys(recipe: str) -> None:
    message = complaint(recipe, "train.steps=5")
    assert "'train.steps'" in message
    assert "5" in message
    assert "num_steps, tasks_per_step, group_size" in message
    assert "rank, alpha, target_modules" in complaint(recipe, "policy.lora.r=5")  # of a section that may be null


def test_an_unknown_section_is_named_with_the_sections(recipe: str) -> None:
    message = complaint(recipe, "trainer.num_steps=5")
    assert "'trainer'" in message
    assert "train, eval, tracking" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.num_steps=many", ["train.num_steps", "'many'", "integer"]),
        ("train.tasks_per_step=0", ["train.tasks_per_step", "0", "greater than or equal to 1"]),
        ("rollout.engine=sglang", ["rollout.engine", "'sglang'", "vllm", "transformers"]),
        ("learner.zero_stage=4", ["learner.zero_stage", "4", "0, 1, 2 or 3"]),
        ("algo.clip_eps_low=1.5", ["algo.clip_eps_low", "1.5", "less than 1"]),
        ("bootstrap.hidden_size=100", ["bootstrap.hidden_size", "100", "multiple of 32"]),
        ("train=5", ["train", "5"]),
        ("rollout.temperature=0.001", ["rollout.temperature", "0.001", "greater than or equal to 0.01"]),
        ("eval.temperature=0", ["eval.temperature", "greater than or equal to 0.01"]),
        ("learner.adam_betas=[0.9,1.5]", ["learner.adam_betas", "1.5", "less than 1"]),
        ("train.num_steps=010", ["train.num_steps='010': ", "a 0 before its digits", "leave it out"]),
        ("learner.zero_stage=01", ["learner.zero_stage='01': ", "leave it out"]),
        ("train.num_steps=1:30", ["train.num_steps='1:30': ", "integer"]),
        ("learner.lr=1:30.5", ["learner.lr='1:30.5': ", "number"]),
        ("train.num_steps=true", ["train.num_steps=True: ", "true is no number", "yes and on"]),
        ("eval.num_samples=off", ["eval.num_samples=False: ", "false is no number"]),
        ("learner.lr=yes", ["learner.lr=True: ", "no number"]),
        ("learner.zero_stage=true", ["learner.zero_stage=True: ", "no number"]),
        ("learner.adam_betas=[false, 0.9]", ["learner.adam_betas=[False, 0.9]: ", "no number"]),
        ("tracking.wandb_project=a/b", ["tracking.wandb_project='a/b': ", "none of / \\ # ? % :", "WANDB_ENTITY"]),
        ("tracking.wandb_project=''", ["tracking.wandb_project=''", "at least 1 character"]),
        ('tracking.wandb_tags=[good, ""]', ["tracking.wandb_tags.1=''", "at least 1 character"]),
        (f"tracking.wandb_tags=[{'x' * 65}]", ["tracking.wandb_tags.0='xxx", "at most 64 characters"]),
        ("seed=-1", ["seed", "-1", "greater than or equal to 0"]),
        ("seed=4294967296", ["seed", "4294967296", "less than 2147483648"]),
        ("bootstrap.seed=4294967296", ["bootstrap.seed", "4294967296", "less than 2147483648"]),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(recipe: str, override: str, parts: list[str]) -> None:
    message = complaint(recipe, override)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["task.path=x.jsonl"], ["x.jsonl'", "task.source='generated'", "set task.source=gsm8k"]),
        (["algo.advantage=grpo", "algo.kl_coef=0"], ["algo.advantage=grpo", "train.group_size=1", "set train.group_size=2"]),
        (["algo.advantage=rloo", "train.group_size=4"], ["algo.advantage=rloo", "algo.kl_in=reward", "set algo.kl_in=loss"]),
        (["bootstrap.num_heads=3"], ["bootstrap.num_heads=3", "bootstrap.hidden_size=128", "set bootstrap.num_heads=4"]),
        (["rollout.num_cpus=0"], ["rollout.num_cpus=0", "rollout.num_gpus=0", "set rollout.num_cpus=0.1 or more"]),
        (["learner.num_cpus=0"], ["learner.num_cpus=0", "learner.num_gpus=0", "set learner.num_cpus=0.1 or more"]),
        (["learner.num_gpus=0.5", "learner.num_ranks=2"], ["learner.num_gpus=0.5", "learner.num_ranks=2", "set learner.num_gpus=1 or 0"]),
        (["rollout.num_gpus=0.5", "rollout.num_actors=2"], ["rollout.num_gpus=0.5", "rollout.num_actors=2", "set rollout.num_gpus=1 or 0"]),
        (["rollout.num_gpus=0.5", "rollout.max_actors=3"], ["rollout.num_gpus=0.5", "rollout.max_actors=3", "cannot share a GPU"]),
        (["policy.dtype=bfloat16"], ["policy.dtype=bfloat16", "learner.zero_stage=0", "set learner.zero_stage=2 or 3"]),
        (["algo.kl_in=loss"], ["algo.kl_estimator=k1", "algo.kl_in=loss", "set algo.kl_estimator=k2 or k3"]),
        (["tools.custom.Mine=mine.py:Mine"], ["tools.custom.Mine", "tools.names=['SimpleCalculatorTool']", "add it there"]),
        (["tools.app=x", "tools.options.SimpleCalculatorTool.a=1"], ["tools.app='x'", "tools.options={'Si", "set tools.options={} or"]),
        (["tools.app=x", "tools.pools.SimpleCalculatorTool.num_cpus=1"], ["tools.pools={'SimpleCalculatorTool': {'num_cpus': 1.0}}"]),
        (["tools.app=x", "tools.num_replicas=2"], ["tools.app='x'", "tools.num_replicas=2", "set tools.num_replicas=1 or tools.app=null"]),
        (["tools.app=x", "tools.num_cpus=2"], ["tools.app='x'", "tools.num_cpus=2", "set tools.num_cpus=0.1 or"]),
        (["tools.app=x", "tools.max_in_flight=2"], ["tools.app='x'", "tools.max_in_flight=2", "set tools.max_in_flight=64 or"]),
        (["tools.app=x", "tools.start_timeout_s=2"], ["tools.app='x'", "tools.start_timeout_s=2", "set tools.start_timeout_s=120 or"]),
        (["eval.num_tasks=900"], ["eval.num_tasks=900", "task.num_heldout=500", "set task.num_heldout higher"]),
        (
            ["episode.max_context_tokens=4096"],
            ["episode.max_context_tokens=4096", "bootstrap.max_context_tokens=256", "set bootstrap.max_context_tokens=4096"],
        ),
        (
            ["algo.advantage=reinforce_pp", "policy.separate_critic=true"],
            ["algo.advantage=reinforce_pp", "policy.separate_critic=true", "set policy.separate_critic=false"],
        ),
        (
            ["policy.lora.rank=4", "policy.separate_critic=true"],
            ["policy.lora.rank=4", "policy.separate_critic=true", "or policy.lora=null"],
        ),
    ],
)
def test_a_contradiction_is_named_with_both_values(recipe: str, overrides: list[str], parts: list[str]) -> None:
    message = complaint(recipe, *overrides)
    assert [part for part in parts if part not in message] == []


ON_GPUS = ["rollout.num_gpus=1", "learner.num_gpus=1"]
ON_ONE_GPU = ["rollout.num_gpus=0.5", "learner.num_gpus=0.5", "rollout.gpu_memory_utilization=0.5"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["weights.backend=nccl"], ["weights.backend=nccl", "rollout.num_gpus=0", "set weights.backend=auto"]),
        (["weights.backend=ipc", "rollout.num_gpus=0.5"], ["weights.backend=ipc", "learner.num_gpus=0", "set weights.backend=auto"]),
        (
            [*ON_GPUS, "rollout.engine=transformers", "weights.backend=nccl"],
            ["rollout.engine=transformers", "weights.backend=nccl", "set weights.backend=auto"],
        ),
        (
            [*ON_GPUS, "weights.backend=ipc"],
            ["weights.backend=ipc", "rollout.num_gpus=1 and learner.num_gpus=1", "rollout.num_gpus=0.5", "or weights.backend=auto"],
        ),
        (
            [*ON_ONE_GPU, "weights.backend=ipc", "rollout.num_actors=2"],
            ["weights.backend=ipc", "rollout.num_actors=2", "set one of each"],
        ),
        (
            [*ON_ONE_GPU, "weights.backend=nccl"],
            ["weights.backend=nccl", "rollout.num_gpus=0.5", "set rollout.num_gpus=1 and learner.num_gpus=1", "or weights.backend=ipc"],
        ),
        (
            [*ON_ONE_GPU, "rollout.num_actors=2"],
            ["weights.backend=auto", "rollout.num_gpus=0.5", "rollout.num_actors=2", "set rollout.num_gpus=1"],
        ),
        (["rollout.num_gpus=2"], ["rollout.num_gpus=2", "rollout.num_actors=1", "set rollout.num_gpus=1"]),
        (["learner.num_gpus=1.5"], ["learner.num_gpus=1.5", "learner.num_ranks=1", "set learner.num_gpus=1"]),
        (
            ["rollout.num_gpus=0.5", "learner.num_gpus=0.5"],
            ["rollout.gpu_memory_utilization=0.85", "learner.num_gpus=0.5", "set rollout.gpu_memory_utilization=0.6"],
        ),
    ],
)
def test_a_contradiction_about_gpus_is_named_with_both_values(recipe: str, overrides: list[str], parts: list[str]) -> None:
    message = complaint(recipe, *overrides)
    assert [part for part in parts if part not in message] == []


shares = st.sampled_from([0, 0.25, 0.5, 1, 2])


@settings(max_examples=400)
@given(
    gpus=st.tuples(shares, shares),
    counts=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    engine=st.sampled_from(["vllm", "transformers"]),
    backend=st.sampled_from(["auto", "object_store", "nccl", "ipc"]),
    utilization=st.sampled_from([0.5, 0.85]),
)
def test_an_accepted_configuration_has_a_weight_backend_that_can_work(gpus, counts, engine, backend, utilization) -> None:
    tree = {
        "recipe": "r",
        "rollout": {"engine": engine, "num_gpus": gpus[0], "num_actors": counts[0], "gpu_memory_utilization": utilization},
        "learner": {"num_gpus": gpus[1], "num_ranks": counts[1]},
        "weights": {"backend": backend},
    }
    try:
        accepted = config.RunConfig.model_validate(tree)
    except ValidationError:
        return
    chosen = select_backend(accepted)
    if chosen == "ipc":
        assert shares_gpu(accepted) and engine == "vllm" and utilization == 0.5
    elif chosen == "nccl":
        assert gpus == (1, 1) and engine == "vllm"
    assert max(gpus) <= 1


@pytest.mark.parametrize("path", ["model", "./model", "org/name", "../here/model", "~/model"])
def test_a_policy_folder_that_is_there_is_named_absolutely(recipe: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    for folder in ("model", "org/name"):
        (here / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    found = recipes.load(recipe, [f"policy.path={path}"]).policy.path
    assert Path(found).is_absolute() and Path(found).samefile(here / path.removeprefix("~/"))


@pytest.mark.parametrize("path", ["tiny", "org/name", "name", "/not/there"])
def test_tiny_and_what_is_no_folder_stay_as_they_are(recipe: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipes.load(recipe, [f"policy.path={path}"]).policy.path == path


def test_a_template_that_is_none_is_named_with_its_status() -> None:
    message = complaint("calculator", "episode.shown={timeout: 'late: {result}'}")
    assert message.startswith("episode.shown.timeout='late: {result}' has a field that is neither {text} nor {tool}")
    shown = recipes.load("calculator", ["episode.shown={timeout: late}"]).episode.shown
    assert (shown["timeout"], shown["ok"]) == ("late", "{text}")


def test_a_run_that_joins_a_service_is_saved_and_loaded_as_any_other(recipe: str, tmp_path: Path) -> None:
    loaded = recipes.load(recipe, ["tools.app=x", "tools.max_queued=9", "tools.cache_size=9"])
    (tmp_path / "config.yaml").write_text(recipes.dump(loaded))
    assert recipes.load(str(tmp_path / "config.yaml")) == loaded


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_the_saved_configuration_of_a_recipe_loads_as_the_same(name: str, tmp_path: Path) -> None:
    loaded = recipes.load(name)
    path = tmp_path / "config.yaml"
    path.write_text(recipes.dump(loaded))
    assert recipes.load(str(path)) == loaded


names = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1)


@given(lr=st.floats(1e-9, 1.0), steps=st.integers(0, 10**6), path=names)
def test_any_configuration_survives_being_saved(lr: float, steps: int, path: str) -> None:
    original = config.RunConfig.model_validate(
        {"recipe": "r", "learner": {"lr": lr}, "train": {"num_steps": steps}, "policy": {"path": path}}
    )
    assert config.RunConfig.model_validate(yaml.safe_load(recipes.dump(original))) == original
