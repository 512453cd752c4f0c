"""YAML without what only surprises those who write it: a key that is there twice, octal 010, sexagesimal 1:30, dates."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Repeated(yaml.YAMLError):
    """A mapping has a key twice. The message says which, and where."""


class _Loader(yaml.SafeLoader):
    """Without dates: no key holds one, and a folder may be named like one. A key that comes again is refused: the last would win."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}  # of each key
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise Repeated(f"the key {key.value!r} is there twice, in lines {lines[name]} and {line}; keep one of them")
            lines[name] = line
        return node


def _decimal(form: re.Pattern[str]) -> re.Pattern[str]:
    """Without YAML 1.1's octal 010 and its sexagesimal 1:30, which nobody means who writes them here."""
    return re.compile(rf"(?![-+]?0[0-9_]+$)(?!.*:){form.pattern}", form.flags)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _decimal(form) if tag.endswith((":int", ":float")) else form)
        for tag, form in resolvers
        if tag != "tag:yaml.org,2002:timestamp"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, also for what only looks like a value, such as 0x_."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"a value in it is none ({error})") from None
