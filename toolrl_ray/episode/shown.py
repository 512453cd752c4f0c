"""What the policy is shown for a call, by how the call ended: templates that a recipe may change (`episode.shown`).

A template holds `{text}`, the tool's words, and `{tool}`, its name, as often as it likes. The status itself is recorded apart from what
is shown, and no template changes it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

from tools_service.protocol import ToolStatus

# The text of OUTPUT_LIMIT is partial output.
SHOWN: Mapping[ToolStatus, str] = {
    ToolStatus.OK: "{text}",
    ToolStatus.OUTPUT_LIMIT: "{text}",
    ToolStatus.TOOL_ERROR: "Error: {text}",
    ToolStatus.BAD_ARGUMENTS: "Error: {text}",
    ToolStatus.UNKNOWN_TOOL: "Error: {text}",
    ToolStatus.TIMEOUT: "Error: the tool took too long",
    ToolStatus.MEMORY_LIMIT: "Error: the tool ran out of memory",
    ToolStatus.OVERLOADED: "Error: the tool is busy",
    ToolStatus.UNAVAILABLE: "Error: the tool is not available",
}
FIELDS = ("text", "tool")


def check_template(template: str) -> str:
    """The template. Raises ValueError, in one line, where it is none."""
    try:
        fields = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{template!r} is not a template ({error}); write {{{{ and }}}} for braces") from None
    for name, form, conversion in fields:
        if name not in FIELDS or form or conversion:
            raise ValueError(f"{template!r} has a field that is neither {{text}} nor {{tool}}; write {{{{ and }}}} for braces")
    return template


def show(template: str, tool: str, text: str) -> str:
    return template.format_map({"text": text, "tool": tool})
