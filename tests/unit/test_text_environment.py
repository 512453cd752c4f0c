"""What TRL's TextEnvironment got wrong is right here: a test for each of its known defects, named after it; and what it got right."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
import time

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.unit.text_parts import PROMPT, call, environment, no_reward, tiny_lm, tokenizer
from toolrl_ray.errors import ConfigError
from toolrl_ray.text_environment import TextEnvironment
from toolrl_ray.types import StopReason
from tools_service.protocol import ToolStatus

SUBMIT = "ok<submit>"


def double(text: str) -> str:
    return text + text


def text_of(env: TextEnvironment, tokens: torch.Tensor) -> str:
    return env.tokenizer.decode(tokens, skip_special_tokens=False)


def test_a_run_returns_what_trl_returned():
    script = {"a": [call("double", "12"), "1212<submit>"], "b": ["Result=b<submit>"]}
    env = environment(script, [double], lambda texts, answers: [float(a in t) for t, a in zip(texts, answers, strict=True)])
    queries, responses, masks, rewards, histories = env.run(["a", "b"], answers=["1212", "c"])
    assert [q.tolist() for q in queries] == [env.tokenizer(PROMPT + task).input_ids for task in "ab"]
    assert text_of(env, responses[0]) == "<request><double>12<call>1212<response>1212<submit>"
    assert text_of(env, responses[0][masks[0].bool()]) == "<request><double>12<call>1212<submit>"
    assert [float(r) for r in rewards] == [1.0, 0.0] and all(r.shape == () for r in rewards)
    assert {x.dtype for x in queries + responses + masks} == {torch.int64}
    assert [h.text for h in histories] == [PROMPT + "a<request><double>12<call>1212<response>1212<submit>", PROMPT + "bResult=b<submit>"]
    assert histories[0].system_spans == [True, False, True, False] and histories[0].last_text_segment == "1212<submit>"
    assert all(h.completed and not h.truncated for h in histories)
    for history, parts in zip(histories, zip(queries, responses, masks, strict=True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(history.split_query_response_tokens(), parts, strict=True))
    assert env.run([]) == ([], [], [], [], [])


def test_max_length_works_and_sets_truncated():
    query = len(PROMPT) + 1
    limits = {"max_length": query + 10, "generation_kwargs": {"max_new_tokens": 50}}
    env = environment({"a": ["1234567890123"], "b": [call("double", "1")], "c": [SUBMIT]}, [double], **limits)
    _, responses, masks, _, histories = env.run(["a", "b", "c"])
    assert text_of(env, responses[0]) == "1234567890" and masks[0].all()
    assert text_of(env, responses[1]) == "<request><double>1"  # ten tokens, a marker is one
    assert [h.truncated for h in histories] == [True, True, False]
    assert [h.trajectory.stop_reason for h in histories] == [StopReason.CONTEXT, StopReason.CONTEXT, StopReason.SUBMITTED]


def test_a_query_as_long_as_max_length_is_an_episode_without_a_response():
    env = environment({"abc": [SUBMIT]}, max_length=len(PROMPT) + 3)
    queries, responses, masks, rewards, [history] = env.run(["abc"])
    assert len(queries[0]) == len(PROMPT) + 3 and len(responses[0]) == len(masks[0]) == 0
    assert history.truncated and float(rewards[0]) == 0


def test_without_max_length_an_episode_ends_where_the_model_cannot_read_on():
    env = environment({"a": ["z" * 600]}, generation_kwargs={"max_new_tokens": 1000})
    _, _, _, _, [history] = env.run(["a"])
    assert len(history.tokens) == 512 and history.truncated


def test_a_max_length_beyond_what_the_model_can_read_ends_an_episode_where_the_model_does():
    made = tokenizer()
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, vocab_size=len(made), bos_token_id=1, eos_token_id=2))
    env = TextEnvironment(gpt2, made, [], no_reward, PROMPT, max_length=64, generation_kwargs={"max_new_tokens": 60})
    *_, [history] = env.run(["a"])
    assert len(history.tokens) <= 32 and history.completed


def test_text_after_eos_is_never_in_the_mask():
    env = environment({"a": ["no<eos>after the end"], "b": ["much longer, so that its batch goes on<submit>"]})
    _, responses, masks, _, histories = env.run(["a", "b"])
    assert text_of(env, responses[0]) == "no<eos>" and masks[0].all()
    assert histories[0].trajectory.stop_reason is StopReason.EOS and not histories[0].truncated


def test_an_unknown_tool_says_so():
    env = environment({"a": [call("Tripler", "1"), SUBMIT]}, [double])
    _, responses, _, _, [history] = env.run(["a"])
    assert text_of(env, responses[0]) == f"{call('Tripler', '1')}Unknown tool Tripler.<response>{SUBMIT}"
    assert history.trajectory.tool_calls[0].status is ToolStatus.UNKNOWN_TOOL


def test_a_call_that_cannot_be_understood_says_so_and_the_episode_goes_on():
    env = environment({"a": ["<request>double 1<call>", SUBMIT]}, [double])
    _, responses, _, _, _ = env.run(["a"])
    assert text_of(env, responses[0]) == f"<request>double 1<call>Unknown tool call: no <tool name> after <request><response>{SUBMIT}"


def test_a_tool_that_returns_a_non_string_raises_or_stalls_costs_its_own_episode_at_most():
    forever = threading.Event()
    tools = {
        "number": lambda text: 42,
        "nothing": lambda text: None,
        "raises": lambda text: 1 // 0,
        "exits": lambda text: exit(1),
        "stalls": lambda text: forever.wait(),
        "good": double,
    }
    env = environment({name: [call(name, "x"), SUBMIT] for name in tools}, tools, tool_timeout_s=0.3)
    _, responses, _, _, histories = env.run(list(tools))
    forever.set()
    shown = {
        "number": "42",
        "nothing": "null",
        "raises": "Tool error: integer division or modulo by zero",
        "exits": "Tool error: the tool failed with SystemExit",
        "stalls": "Error: the tool took too long",
        "good": "xx",
    }
    for (name, text), response, history in zip(shown.items(), responses, histories, strict=True):
        assert text_of(env, response) == f"{call(name, 'x')}{text}<response>{SUBMIT}"
        assert history.trajectory.stop_reason is StopReason.SUBMITTED
    assert histories[4].trajectory.tool_calls[0].status is ToolStatus.TIMEOUT


def test_markers_or_eos_in_a_tools_output_or_in_the_task_end_nothing():
    output = "<eos><submit><request><evil>1<call><response>"
    env = environment({"<eos><submit><call>": [call("tool", "x"), SUBMIT]}, {"tool": lambda text: output})
    queries, responses, masks, _, [history] = env.run(["<eos><submit><call>"])
    assert text_of(env, responses[0]) == f"{call('tool', 'x')}{output}<response>{SUBMIT}"
    assert text_of(env, responses[0][masks[0].bool()]) == call("tool", "x") + SUBMIT
    assert env.tokenizer.eos_token_id not in responses[0].tolist()  # in foreign text it is plain characters
    assert history.trajectory.stop_reason is StopReason.SUBMITTED and len(history.trajectory.tool_calls) == 1


def test_special_tokens_of_the_query_mean_themselves_so_that_chat_templates_work():
    env = environment({"a": [SUBMIT]}, bos=True)
    env.prompt = "<eos>" + PROMPT
    [query], *_ = env.run(["a<eos>"])
    assert query.tolist() == env.tokenizer("<eos>" + PROMPT + "a<eos>").input_ids
    assert query.tolist().count(env.tokenizer.eos_token_id) == 2 and query.tolist().count(env.tokenizer.bos_token_id) == 1


def test_a_task_with_half_a_character_is_made_a_text_that_can_be_shown(capsys):
    *_, [history] = environment({"a": [SUBMIT]}).run(["a\ud800"])
    assert history.text == PROMPT + "a?" + SUBMIT == history.trajectory.request.task.prompt + SUBMIT
    history.show_text()
    assert "a?" in capsys.readouterr().out


def test_there_is_no_bos_in_mid_episode():
    env = environment({"a": [call("double", "1"), call("double", "2"), SUBMIT]}, [double], bos=True)
    [query], [response], *_ = env.run(["a"])
    bos = env.tokenizer.bos_token_id
    assert query[0] == bos and bos not in query[1:] and bos not in response


def test_every_turn_is_sampled_from_exactly_the_tokens_before_it():
    env = environment({"a": [call("double", "1"), SUBMIT]}, [double])
    [query], [response], *_ = env.run(["a"])
    whole = [*query.tolist(), *response.tolist()]
    assert len(env.model.prompts) == 2 and all(prompt == whole[: len(prompt)] for prompt in env.model.prompts)


def test_running_out_of_turns_or_tokens_sets_truncated():
    script = {"turns": [call("double", "1")] * 3, "tokens": ["z" * 99], "eos": ["zz<eos>"]}
    env = environment(script, [double], max_turns=2, generation_kwargs={"max_new_tokens": 30})
    _, responses, _, _, histories = env.run(list(script))
    assert [h.truncated for h in histories] == [True, True, False]
    reasons = [StopReason.MAX_TURNS, StopReason.TURN_TOKENS, StopReason.EOS]
    assert [h.trajectory.stop_reason for h in histories] == reasons
    assert text_of(env, responses[0]).endswith("<call>")  # a call whose answer nobody would read is not run
    assert len(histories[0].trajectory.tool_calls) == 1


def test_the_reward_function_can_ask_for_the_whole_history():
    def used_tool(responses, histories, bonus):
        return [
            bonus * len(h.trajectory.tool_calls) + h.text.count("answer") + r.count("answer")
            for r, h in zip(responses, histories, strict=True)
        ]

    env = environment({"a": ["answer" + call("double", "1"), "answer<submit>"], "b": [SUBMIT]}, [double], used_tool)
    *_, rewards, histories = env.run(["a", "b"], bonus=10)
    assert [float(r) for r in rewards] == [13.0, 0.0]
    assert [float(h.reward) for h in histories] == [h.trajectory.reward for h in histories] == [13.0, 0.0]


def test_the_reward_function_is_given_what_the_model_wrote_last_never_a_tools_words():
    seen = []
    script = {"a": [call("tool", "x"), "mine<submit>"], "b": [call("tool", "y"), call("tool", "z")]}
    env = environment(script, {"tool": lambda _: "Result=1"}, lambda responses: seen.extend(responses) or [0, 0], max_turns=2)
    env.run(["a", "b"])
    assert seen == ["mine<submit>", call("tool", "z")]


@pytest.mark.parametrize("query", ["1>0", "if a > b: print('<tool>')", ">", "a>b>c"])
def test_the_first_greater_than_of_a_query_does_not_split_it(query):
    seen = []
    env = environment({"task": [call("tool", query), SUBMIT]}, {"tool": lambda text: seen.append(text) or "ok"})
    env.run(["task"])
    assert seen == [query]


def test_tools_run_concurrently():
    together = threading.Barrier(3)  # none comes through unless all three are there
    script = {name: [call("meet", name), SUBMIT] for name in ("a", "b", "c")}
    env = environment(script, {"meet": lambda text: str(together.wait(5) >= 0)}, tool_timeout_s=10)
    *_, histories = env.run(["a", "b", "c"])
    assert [h.trajectory.tool_calls[0].text for h in histories] == ["True"] * 3


def test_the_model_is_in_eval_mode_while_it_samples_and_each_of_its_modules_is_afterwards_as_it_was():
    env = environment({"a": [SUBMIT]})
    env.model.train()
    env.model.inner.eval()
    env.run(["a"])
    assert not any(env.model.modes) and env.model.training and not env.model.inner.training


def test_the_tokenizer_and_the_generation_kwargs_come_back_unchanged():
    kwargs = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 5}
    made = tokenizer()
    env = TextEnvironment(tiny_lm(made), made, [double], no_reward, PROMPT, generation_kwargs=kwargs)
    made.padding_side = "right"
    made("x", padding="max_length", max_length=9, truncation=True)

    def state():
        return {**made.__dict__, "backend": made.backend_tokenizer.to_str(), "padding_side": made.padding_side}

    before = state()
    env.run(["a", "bcd"])
    assert state() == before
    assert kwargs == {"do_sample": True, "temperature": 0.7, "max_new_tokens": 5} and env.generation_kwargs is kwargs


def test_trls_spelling_of_max_tool_response_is_understood():
    assert environment({}, max_tool_reponse=400).max_tool_response == 400


async def test_a_run_works_inside_a_running_event_loop_as_in_a_notebook():
    env = environment({"a": [call("double", "1"), SUBMIT], "b": [SUBMIT]}, [double])
    _, [response], *_ = env.run(["a"])
    assert text_of(env, response) == f"{call('double', '1')}11<response>{SUBMIT}"
    _, [response], *_ = await asyncio.to_thread(env.run, ["b"])  # and outside of it, with the same tools
    assert text_of(env, response) == SUBMIT
    env.reward_fn = lambda responses: [1.0, 2.0]
    env.model.turns.clear()
    with pytest.raises(ConfigError, match="2 rewards for 1 responses"):
        env.run(["b"])


async def test_a_model_that_fails_inside_a_running_event_loop_raises_its_error():
    env = environment({"a": []})
    with pytest.raises(IndexError):
        env.run(["a"])


def test_a_notebooks_interrupt_ends_the_run_that_it_interrupts_before_the_next_begins():
    env = environment({"a": ["z" * 99], "b": [SUBMIT]})

    def interrupted(module, args, kwargs):
        hook.remove()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.5)  # a forward that is still under way when the interrupt has been taken

    async def cell(task):
        return env.run([task])

    hook = env.model.register_forward_pre_hook(interrupted, with_kwargs=True)
    loop = asyncio.new_event_loop()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell("a"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert text_of(env, loop.run_until_complete(cell("b"))[1][0]) == SUBMIT
    assert not any(env.model.modes) and env.model.training
    loop.close()


def test_a_run_that_fails_leaves_nothing_behind_for_the_next():
    env = environment({"bad": [], "good": ["fine<submit>"], "waits": [call("stall", "x")]}, {"stall": lambda _: threading.Event().wait(2)})
    with pytest.raises(IndexError):
        env.run(["waits", "bad"])
    env.model.prompts.clear()
    _, [response], *_ = env.run(["good"])
    assert text_of(env, response) == "fine<submit>" and len(env.model.prompts) == 1
    assert env.model.training


def test_sampling_follows_torchs_seed():
    made = tokenizer()
    sample = {"do_sample": True, "max_new_tokens": 12}
    env = TextEnvironment(tiny_lm(made), made, [], no_reward, PROMPT, generation_kwargs=sample)

    def responses(seed):
        torch.manual_seed(seed)
        return [[r.tolist() for r in env.run(["a", "b"])[1]] for _ in range(2)]

    first = responses(1)
    assert first == responses(1) and first != responses(2) and first[0] != first[1]
    env.generation_kwargs = {"max_new_tokens": 12}
    assert env.run(["a"])[1][0].tolist() == env.run(["a"])[1][0].tolist()  # greedy unless told otherwise, as in TRL


def test_greedy_responses_are_those_of_generate():
    made = tokenizer()
    lm = tiny_lm(made)
    env = TextEnvironment(lm, made, [], no_reward, PROMPT, generation_kwargs={"max_new_tokens": 15})
    queries, responses, *_ = env.run(["What is 1+1?", "x", "Longer than the others by far: 12345"])
    for query, response in zip(queries, responses, strict=True):
        wanted = lm.generate(query[None], attention_mask=torch.ones_like(query)[None], do_sample=False, max_new_tokens=15, pad_token_id=0)
        assert response.tolist() == wanted[0, len(query) :].tolist()[: len(response)]
        assert len(response) == 15 or text_of(env, response).endswith(("<eos>", "<call>", "<submit>"))


@pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 50), ("min_p", 0.1), ("repetition_penalty", 1.2), ("num_beams", 4)])
def test_what_bends_the_distribution_is_refused_in_one_line(name, value):
    with pytest.raises(ConfigError) as refused:
        environment({}, generation_kwargs={"do_sample": True, name: value})
    assert f"generation_kwargs['{name}']={value}" in str(refused.value) and "\n" not in str(refused.value)


def test_what_trls_scripts_give_to_generate_is_understood():
    given = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 2, "eos_token_id": -1, "max_new_tokens": 32}
    env = environment({"a": ["no<eos>"], "b": ["xy"]}, generation_kwargs=given)
    assert text_of(env, env.run(["a"])[1][0]) == "no<eos>"  # EOS ends a text for good
    env.generation_kwargs = {**given, "eos_token_id": [env.tokenizer.convert_tokens_to_ids("x")]}
    assert text_of(env, env.run(["b"])[1][0]) == "x"


@pytest.mark.parametrize(
    "given",
    [
        {"num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "num_beams": 1},
        {"stopping_criteria": None, "penalty_alpha": None, "do_sample": None, "max_new_tokens": None, "eos_token_id": None},
        {"do_sample": False, "top_k": 50, "top_p": 0.9, "temperature": 0.7},  # greedy, so nothing is cut
        {"max_new_tokens": np.int64(5), "eos_token_id": np.int64(2), "top_k": np.int64(0)},
        {"eos_token_id": np.array([2, -1]), "do_sample": True, "temperature": np.float32(1)},
    ],
)
def test_settings_that_leave_the_distribution_as_it_is_are_taken_whatever_they_are_made_of(given):
    env = environment({"a": [SUBMIT]}, generation_kwargs=given)
    assert text_of(env, env.run(["a"])[1][0]).startswith("ok")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"generation_kwargs": {"stopping_criteria": []}}, "generation_kwargs has 'stopping_criteria'"),
        ({"generation_kwargs": {"repetition_penalty": torch.tensor([1.0, 1.0])}}, "generation_kwargs['repetition_penalty']=tensor"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "generation_kwargs['num_return_sequences']=2"),
        ({"generation_kwargs": {"temperature": "1"}}, "generation_kwargs['temperature']='1'"),
        ({"generation_kwargs": {"eos_token_id": "no"}}, "generation_kwargs['eos_token_id']='no'"),
        ({"generation_kwargs": GenerationConfig(do_sample=True)}, "generation_kwargs is a GenerationConfig; give a dict"),
        ({"tools": "SimpleCalculatorTool"}, "tools='SimpleCalculatorTool'; give a list of tools, or a dict of names and tools"),
        ({"tools": None}, "tools=None; give a list"),
        ({"tools": double}, "tools=<function double"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0}}, "temperature"),
        ({"generation_kwargs": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_tool_response": 2}, "max_tool_response=2"),
        ({"tool_timeout_s": 0}, "tool_timeout_s=0"),
        ({"tool_timeout_s": None}, "tool_timeout_s=None: give seconds"),
        ({"generation_kwargs": {"do_sample": "no"}}, "generation_kwargs['do_sample']='no': give True or False"),
        ({"reward_fn": None}, "reward_fn=None"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as refused:
        environment({}, **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_one_text_or_nothing_in_place_of_a_list_is_refused():
    env = environment({"a": [SUBMIT]})
    with pytest.raises(ConfigError, match="give a list"):
        env.run("a")
    with pytest.raises(ConfigError, match="give a list"):
        env.run(answers=["a"])
    for wrong in (None, 1):
        with pytest.raises(ConfigError, match=f"^task 1 is {wrong}; give a text$"):
            env.run(["a", wrong])


def test_the_tasks_may_be_named_queries_as_in_trl_and_a_reward_function_may_use_either_name():
    env = environment({"a": [SUBMIT]})
    assert text_of(env, env.run(queries=["a"])[1][0]) == SUBMIT
    env = environment({"a": [SUBMIT]}, reward_fn=lambda responses, tasks, queries: [tasks + queries])
    assert float(env.run(["a"], tasks=1, queries=2)[3][0]) == 3


@pytest.mark.parametrize(
    "returned, said",
    [
        (None, "reward_fn returned None; return one number for each of the 2 responses"),
        (1.0, "reward_fn returned 1.0; return one number"),
        (torch.tensor(1.0), "reward_fn returned tensor(1.); return one number"),
        (torch.zeros(2, 2), "reward_fn returned tensor([0., 0.]) for task 0; return one number"),
        ([1, None], "reward_fn returned None for task 1; return one number"),
        ({0: 1, 1: 0}, "reward_fn returned {0: 1, 1: 0}; return one number"),
        ({0, 1}, "reward_fn returned {0, 1}; return one number"),
        ([0, float("nan")], "reward_fn returned nan for task 1; return a finite number"),
        ([torch.tensor(float("inf")), 0], "reward_fn returned tensor(inf) for task 0; return a finite number"),
    ],
)
def test_rewards_that_are_none_are_refused_in_one_line(returned, said):
    with pytest.raises(ConfigError) as refused:
        environment({"a": [SUBMIT], "b": [SUBMIT]}, reward_fn=lambda responses: returned).run(["a", "b"])
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("returned", [[True, 0], np.array([1, 0]), torch.tensor([[1.0], [0.0]]), iter((1, 0))])
def test_rewards_may_be_any_numbers_in_their_order(returned):
    *_, rewards, _ = environment({"a": [SUBMIT], "b": [SUBMIT]}, reward_fn=lambda responses: returned).run(["a", "b"])
    assert [float(reward) for reward in rewards] == [1.0, 0.0]


def test_an_error_of_the_reward_function_stays_its_own():
    def rewards(responses):
        yield 1 // 0

    with pytest.raises(ZeroDivisionError):
        environment({"a": [SUBMIT]}, reward_fn=rewards).run(["a"])


def test_a_reward_function_that_tells_nothing_of_its_parameters_is_called_without_histories():
    count = functools.partial(map, len)
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(count)
    *_, [reward], _ = environment({"a": [SUBMIT]}, reward_fn=count).run(["a"])
    assert float(reward) == len(SUBMIT)


def test_an_environment_may_be_closed_twice():
    env = environment({"a": [SUBMIT]})
    env.close()
    env.close()


def test_a_model_inside_a_wrapper_is_found_and_what_is_no_causal_lm_is_refused():
    made = tokenizer()
    wrapper = torch.nn.Module()
    wrapper.pretrained_model = tiny_lm(made)
    env = TextEnvironment(wrapper, made, [], no_reward, PROMPT)
    assert env.model is wrapper and len(env.run(["a"])[1][0]) > 0
    with pytest.raises(ConfigError, match="model is a str"):
        TextEnvironment("gpt2", made, [], no_reward, PROMPT)
