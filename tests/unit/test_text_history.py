"""What a TextHistory holds and shows, with rich and without."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.unit.text_parts import PROMPT, call, environment
from toolrl_ray.text_environment import TextHistory

SHOWN = [PROMPT + "a", "<request><double>[b]<call>", "[b][b]<response>", "ok<submit>", "Reward: 0.5"]


@pytest.fixture
def env():
    script = {"a": [call("double", "[b]"), "ok<submit>"]}  # [b] is markup to rich, and must not be
    return environment(script, {"double": lambda text: 2 * text}, lambda responses: [0.5])


@pytest.fixture
def history(env):
    return env.run(["a"])[-1][0]


def rich_text(monkeypatch, show) -> str:
    """What rich prints in a terminal with colours."""
    import rich
    from rich.console import Console

    console = Console(force_terminal=True, color_system="truecolor", width=30)
    with console.capture() as captured:
        monkeypatch.setattr(rich, "get_console", lambda: console)
        show()
    return captured.get()


def test_show_text_gives_each_segment_the_colour_of_who_wrote_it(monkeypatch, history):
    printed = rich_text(monkeypatch, history.show_text)
    colours = [printed.partition(part.splitlines()[0])[0].rpartition("\x1b[")[2] for part in SHOWN]
    assert colours[1] == colours[3]  # the model
    assert len(set(colours)) == 4 and all(colour.startswith("30;48;") for colour in colours)


def test_show_text_prints_the_text_as_it_is_where_there_are_no_colours(capsys, history):
    history.show_text()
    assert capsys.readouterr().out == "".join(SHOWN[:-1]) + "\n\n" + SHOWN[-1] + "\n"


def test_show_tokens_prints_every_token_and_a_legend_where_asked(capsys, env, history):
    history.show_tokens(env.tokenizer, show_legend=True)
    printed = capsys.readouterr().out
    assert "<request> < d o u b l e > [ b ] <call> [ b ] [ b ] <response> o k <submit> " in printed
    assert "Reward: 0.5" in printed and "(Colour Legend: Prompt|System|Model|Reward)" in printed


def test_the_legend_has_the_four_colours(monkeypatch, history):
    printed = rich_text(monkeypatch, history.show_colour_legend)
    colours = {printed.partition(name)[0].rpartition("\x1b[")[2] for name in ("Prompt", "System", "Model", "Reward")}
    assert len(colours) == 4


def test_without_rich_the_segments_are_named_and_one_line_says_how_to_get_colours(monkeypatch, capsys, env, history):
    monkeypatch.setitem(sys.modules, "rich", None)
    history.show_text(show_legend=True)
    history.show_tokens(env.tokenizer)
    printed = capsys.readouterr().out
    assert (
        f"[prompt]{PROMPT}a[model]<request><double>[b]<call>[system][b][b]<response>[model]ok<submit>\n\n[reward]Reward: 0.5\n" in printed
    )
    assert printed.count("pip install rich") == 3


def test_a_history_of_an_episode_without_a_response_is_shown_too(capsys):
    env = environment({"a": []}, max_length=3)
    [history] = env.run(["a"])[-1]
    history.show_text()
    assert capsys.readouterr().out.startswith(PROMPT + "a\n\nReward: 0")


def test_a_history_can_be_put_together_by_hand_as_in_trl():
    history = TextHistory("ab", torch.tensor([1, 2]))
    history.append_segment("c", torch.tensor([3]), system=False)
    history.append_segment("d", torch.tensor([4]))
    history.complete(truncated=True)
    assert history.text == "abcd" and history.tokens.tolist() == [1, 2, 3, 4] and history.token_masks.tolist() == [0, 0, 1, 0]
    assert history.text_spans == history.token_spans == [(0, 2), (2, 3), (3, 4)] and history.last_text_segment == "d"
    assert [part.tolist() for part in history.split_query_response_tokens()] == [[1, 2], [3, 4], [1, 0]]
    assert history.completed and history.truncated and history.reward == 0.0
    with pytest.raises(ValueError, match="has no tokens"):
        history.append_segment("e", torch.tensor([], dtype=torch.long))
