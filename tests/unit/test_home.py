"""A user without a home folder: HOME is not set, and the system does not know who runs this, as in some containers."""

from __future__ import annotations

import os
import pwd

import pytest

from toolrl_ray import local_ray, submit
from toolrl_ray.bootstrap.build import cache_dir
from toolrl_ray.errors import ConfigError, UserError
from toolrl_ray.tracking import wandb_log


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "TOOLRL_CACHE", "NETRC", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_nobody_is_logged_in() -> None:
    assert not wandb_log.logged_in()


def test_a_local_ray_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    local_ray.start_local()
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32


def test_a_job_is_submitted_without_a_token() -> None:
    with pytest.raises(UserError, match="^no Ray job server at http://127.0.0.1:9 "):
        submit.job_client("http://127.0.0.1:9")


def test_the_tiny_policy_wants_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="^there is no home folder for the cache; .*TOOLRL_CACHE"):
        cache_dir()
    monkeypatch.setenv("TOOLRL_CACHE", "/cache")
    assert str(cache_dir()) == "/cache"
