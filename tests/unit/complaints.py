"""What a person is told of a recipe or an override that is wrong."""

from __future__ import annotations

import pytest

from toolrl_ray import recipe as recipes
from toolrl_ray.errors import ConfigError


def complaint(recipe: str, *overrides: str) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as raised:
        recipes.load(recipe, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message
