"""A study's plan: which runs there are, what each is told, and how far each is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolrl_ray import cli, sweep
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.sweep import State, make_study, plan, split_values

GRID = ["learner.lr=1e-4,1e-3", "task.few_shot=0,1"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4", ["1e-4"]),
        ("1e-4,1e-3", ["1e-4", "1e-3"]),
        ("[A, B]", ["[A, B]"]),
        ("[A, B],[A]", ["[A, B]", "[A]"]),
        ("{A: {k: 1, n: 2}},{}", ["{A: {k: 1, n: 2}}", "{}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("", [""]),
    ],
)
def test_values_are_separated_by_the_commas_that_yaml_does_not_need(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize("value", ["0x_", "2026-02-30"])
def test_what_is_no_value_is_split_off_like_one(value: str) -> None:
    assert split_values(f"{value},5") == [value, "5"]


def test_a_study_has_every_seed_of_every_variant_in_a_folder_of_its_own(tmp_path: Path) -> None:
    runs = plan(make_study("calculator", [*GRID, "train.num_steps=3"], [0, 1]), tmp_path)
    assert [run.name for run in runs[:3]] == ["lr=1e-4,few_shot=0-seed-0", "lr=1e-4,few_shot=0-seed-1", "lr=1e-4,few_shot=1-seed-0"]
    assert [run.index for run in runs] == list(range(8))
    assert {(run.config.learner.lr, run.config.task.few_shot, run.config.seed) for run in runs} == {
        (lr, few_shot, seed) for lr in (1e-4, 1e-3) for few_shot in (0, 1) for seed in (0, 1)
    }
    assert {run.config.train.num_steps for run in runs} == {3}
    assert [run.config.run_dir for run in runs] == [str(tmp_path / run.name) for run in runs]
    assert runs[0].variant == "lr=1e-4, few_shot=0"


def test_overrides_hold_in_the_order_in_which_they_were_given_as_toolrl_train_takes_them(tmp_path: Path) -> None:
    def adapters(*overrides: str) -> list[tuple[int, int]]:
        runs = plan(make_study("calculator", list(overrides), [0]), tmp_path)
        return [(run.config.policy.lora.rank, run.config.policy.lora.alpha) for run in runs]

    values = "policy.lora={rank: 8},{rank: 16}"
    assert adapters(values, "policy.lora.alpha=64") == [(8, 64), (16, 64)]
    assert adapters("policy.lora.alpha=64", values) == [(8, 32), (16, 32)]
    assert adapters("policy.lora={rank: 8}", "policy.lora.alpha=1,2", "policy.lora.rank=4") == [(4, 1), (4, 2)]
    assert adapters("policy.lora.rank=4", "policy.lora={}", "policy.lora.rank=8,16") == [(8, 32), (16, 32)]


def test_a_study_of_an_earlier_version_has_its_variants_behind_the_other_overrides(tmp_path: Path) -> None:
    old = {"recipe": "calculator", "overrides": ["train.num_steps=3"], "grid": {"learner.lr": ["1e-4", "1e-3"]}, "seeds": [0], "cwd": "/"}
    (tmp_path / "study.json").write_text(json.dumps(old))
    study = sweep.open_study(tmp_path)
    sweep.check_recipe(study, tmp_path)  # what its recipe was is not known
    runs = plan(study, tmp_path)
    assert [run.overrides[:2] for run in runs] == [["train.num_steps=3", f"learner.lr={lr}"] for lr in ("1e-4", "1e-3")]


def test_a_study_without_variants_is_named_after_its_recipe_and_its_seeds(tmp_path: Path) -> None:
    runs = plan(make_study("calculator", [], [3, 5]), tmp_path)
    assert [(run.name, run.variant) for run in runs] == [("seed-3", "calculator"), ("seed-5", "calculator")]


def test_the_seed_also_initialises_the_tiny_policy_unless_bootstrap_seed_is_given(tmp_path: Path) -> None:
    def seeds(*overrides: str) -> list[int]:
        return [run.config.bootstrap.seed for run in plan(make_study("calculator", list(overrides), [0, 1, 2]), tmp_path)]

    assert seeds() == [0, 1, 2]
    assert seeds("bootstrap.seed=7") == [7, 7, 7]
    assert seeds("policy.path=org/model") == [0, 0, 0]
    assert {run.config.task.seed for run in plan(make_study("calculator", [], [0, 1]), tmp_path)} == {0}, "all seeds face the same tasks"


def test_runs_are_tagged_with_the_name_of_their_study_beside_their_own_tags(tmp_path: Path) -> None:
    (run,) = plan(make_study("calculator", ["tracking.wandb_tags=[mine]"], [0]), tmp_path / "my-study")
    assert run.config.tracking.wandb_tags == ["mine", "my-study"]


def test_names_that_would_meet_are_told_apart(tmp_path: Path) -> None:
    runs = plan(make_study("calculator", ["policy.path='a b','a_b','a/b'"], [0]), tmp_path)
    assert len({run.name for run in runs}) == 3 and all("/" not in run.name for run in runs)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=3", ["seed=3", "--seeds"]),
        ("run_dir=x", ["run_dir=x", "--dir"]),
        ("train.num_steps", ["'train.num_steps'", "key.path=value"]),
        ("learner.lr=1e-3,1e-3", ["learner.lr=1e-3,1e-3", "twice"]),
        ("learner.lr=1e-3,", ["learner.lr=1e-3,", "empty"]),
    ],
)
def test_what_no_study_can_have_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_study("calculator", [override], [0])
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_variant_that_the_recipe_refuses_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learner.lr=-1"):
        plan(make_study("calculator", ["learner.lr=1e-3,-1"], [0]), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_the_same_study_goes_on_in_its_folder_and_another_is_refused(tmp_path: Path) -> None:
    folder, study = tmp_path / "study", make_study("calculator", GRID, [0, 1])
    assert sweep.claim(study, folder) == sweep.claim(study, folder) == sweep.open_study(folder) == study
    for other in (make_study("calculator", GRID, [0, 1, 2]), make_study("calculator", GRID[:1], [0, 1])):
        with pytest.raises(UserError, match="is of another study: (seeds|grid) .*choose another folder.*--resume"):
            sweep.claim(other, folder)


def test_a_study_whose_recipe_has_changed_since_it_began_runs_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = tmp_path / "mine.yaml", tmp_path / "study"
    recipe.write_text("learner: {lr: 1.0e-4}\n")
    sweep.check_recipe(sweep.claim(make_study(str(recipe), [], [0]), folder), folder)
    recipe.write_text("# said otherwise\nlearner:\n  lr: 1.0e-4\n")
    sweep.check_recipe(sweep.open_study(folder), folder)
    recipe.write_text("learner: {lr: 0.5}\ntask: {few_shot: 1}\n")
    with pytest.raises(UserError, match="mine.yaml' has changed since the study in .*study' began: .*; undo that, or") as error:
        sweep.check_recipe(sweep.open_study(folder), folder)
    assert ": learner.lr was 0.0001 and is 0.5, task was None and is {'few_shot': 1}; " in str(error.value)
    for command in (["--resume", str(folder)], ["--run-one", str(folder), "0"], [str(recipe), "--seeds", "1", "--dir", str(folder)]):
        assert cli.main(["sweep", *command]) == 2
        assert "learner.lr was 0.0001 and is 0.5" in capsys.readouterr().err
    assert cli.main(["sweep", "--plot", str(folder)]) == 1, "what there is can be drawn"
    assert not list(folder.glob("seed-0*"))


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no study; choose another folder"):
        sweep.claim(make_study("calculator", [], [0]), tmp_path)
    with pytest.raises(UserError, match="cannot be made"):
        sweep.claim(make_study("calculator", [], [0]), tmp_path / "file" / "study")
    with pytest.raises(UserError, match="no study.json"):
        sweep.open_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a study"):
        sweep.open_study(tmp_path)


def test_how_far_a_run_is_lies_in_its_folder(tmp_path: Path) -> None:
    (run,) = plan(make_study("calculator", [], [0]), tmp_path)
    run_dir, log = tmp_path / "seed-0", tmp_path / "seed-0.log"
    assert sweep.state(tmp_path, run) is State.MISSING
    log.write_text("toolrl: no engine\n\n")  # it ended before its first step, and took its folder away
    assert sweep.state(tmp_path, run) is State.FAILED
    assert sweep.last_line(log) == "toolrl: no engine"
    with log.open("a") as file:
        assert sweep.hold(file)
        assert sweep.state(tmp_path, run) is State.RUNNING
        with log.open("a") as other:
            assert not sweep.hold(other)
    run_dir.mkdir()
    (run_dir / "eval.json").write_text('{"before": {}, "aft')
    assert sweep.state(tmp_path, run) is State.FAILED
    (run_dir / "eval.json").write_text(json.dumps({"before": {}, "after": {}}))
    assert sweep.state(tmp_path, run) is State.DONE


def test_what_a_failed_run_left_is_kept_under_another_name(tmp_path: Path) -> None:
    (run,) = plan(make_study("calculator", [], [0]), tmp_path)
    for attempt in ("first", "second"):
        (tmp_path / "seed-0").mkdir()
        (tmp_path / "seed-0" / "metrics.jsonl").write_text(attempt)
        assert sweep.arguments(tmp_path, "calculator", run) == ["calculator", *run.overrides]
    assert sorted(path.parent.name + path.read_text() for path in tmp_path.glob("*/metrics.jsonl")) == [
        "seed-0.failed-1first",
        "seed-0.failed-2second",
    ]
    assert not (tmp_path / "seed-0").exists()


def test_a_run_that_left_a_checkpoint_goes_on_from_it(tmp_path: Path) -> None:
    (run,) = plan(make_study("calculator", [], [0]), tmp_path)
    (tmp_path / "seed-0" / "checkpoints" / "step-000010").mkdir(parents=True)
    assert sweep.arguments(tmp_path, "calculator", run) == ["--resume", str(tmp_path / "seed-0")]
    assert (tmp_path / "seed-0").is_dir()
