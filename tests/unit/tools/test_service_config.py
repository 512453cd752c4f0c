from __future__ import annotations

import pytest
from pydantic import ValidationError

from toolrl_ray import placement
from toolrl_ray.config import RunConfig, ToolsConfig
from toolrl_ray.errors import ConfigError, PlacementError
from toolrl_ray.recipe import load as load_recipe
from toolrl_ray.tools.local import LocalTools, tool_factories
from tools_service.config import ServiceConfigError, load, parse
from tools_service.runner import tool_info

CALCULATOR = "SimpleCalculatorTool"


def test_a_service_is_read_from_its_file(tmp_path):
    path = tmp_path / "service.yaml"
    path.write_text(f"app: shared\npools: {{{CALCULATOR}: {{min_replicas: 2, max_replicas: 4}}}}\nhttp: {{port: 8100}}\n")
    config = load(path)
    assert (config.app, config.names, config.http.host, config.http.port) == ("shared", [CALCULATOR], "127.0.0.1", 8100)
    assert (config.pool(CALCULATOR).min_replicas, config.pool(CALCULATOR).most_replicas) == (2, 4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": ["A"]}, "F: unknown key 'name' (value ['A']); allowed there: names, custom, options, pools, start_timeout_s, app, http"),
        ({"http": {"prt": 1}}, "F: unknown key 'http.prt' (value 1); allowed there: host, port"),
        ({"pools": {CALCULATOR: {"min": 1}}}, f"F: unknown key 'pools.{CALCULATOR}.min' (value 1); allowed there: min_replicas, max_rep"),
        ({"custom": {"B": "b.py:B"}}, f"F: custom.B contradicts names=['{CALCULATOR}']: no such tool; add it there or take it away"),
        ({"names": []}, "F: names: List should have at least 1 item"),
        ({"names": ["A", "A"]}, "F: names=['A', 'A'] holds a name twice"),
        ({"names": ["a#b"]}, "F: names=['a#b'] holds 'a#b', but Ray Serve has a use of its own for #; give the tool another name"),
        ({"names": ["a/b"]}, "F: names=['a/b'] holds 'a/b', but names stand in addresses, where / parts them; give the tool another name"),
        ({"names": ["größe"]}, "F: names=['größe'] holds 'größe', but Ray's metrics, which name it, take ASCII alone; give"),
        ({"app": "größe"}, "F: app='größe': Ray's metrics, which name it, take ASCII alone; choose another name"),
        ({"app": "a#b"}, "F: app='a#b': Ray Serve has a use of its own for #; choose another name"),
        ({"app": ""}, "F: app='': String should have at least 1 character"),
        *(
            ({"names": [name]}, f"F: names=[{name!r}] holds {name!r}, but the policy has to write it as <NAME>; give the tool another name")
            for name in ("", " A", "A\n", "<A>")
        ),
        ({"names": ["A", "http"]}, "F: names=['A', 'http'] holds 'http', but that is the service's HTTP face; give the tool another name"),
        ({"names": ["A"], "pools": {"B": {}}}, "F: pools.B contradicts names=['A']: no such tool"),
        ({"names": ["A"], "pools": {"A": {"min_replicas": 3, "max_replicas": 2}}}, "F: pools.A: max_replicas=2 contradicts min_replicas=3"),
        ({"names": ["A"], "pools": {"A": {"target_in_flight": 2}}}, "F: pools.A: target_in_flight=2 contradicts max_replicas=1"),
        (
            {"names": ["A"], "pools": {"A": {"max_replicas": 2, "target_in_flight": 9, "max_in_flight": 8}}},
            "F: pools.A: target_in_flight=9 contradicts max_in_flight=8",
        ),
        ({"names": ["A"], "pools": {"A": {"num_cpus": 0}}}, "F: pools.A.num_cpus=0: Input should be greater than 0"),
        *(
            ({"pools": {CALCULATOR: {"resources": {key: 1}}}}, f"F: pools.{CALCULATOR}.resources: {key} is Ray's own; {remedy}")
            for key, remedy in (("CPU", "set num_cpus"), ("memory", "set memory_bytes"), ("GPU", "leave it out"))
        ),
        ({"names": ["A"], "pools": {"A": {"resources": {"chip": 0}}}}, "F: pools.A.resources.chip=0: Input should be greater than 0"),
        ({"names": ["A"], "pools": {"A": {"resources": {"chip": True}}}}, "F: pools.A.resources: true is no number"),
        ({"names": ["A"], "http": {"port": True}}, "F: http.port=True: true is no number; YAML reads yes and on as true, no and off as"),
        ({"names": ["A"], "http": {"port": 70000}}, "F: http.port=70000: Input should be less than or equal to 65535"),
    ],
)
def test_a_mistake_in_a_service_is_one_line_with_place_and_value(tree, message):
    with pytest.raises(ServiceConfigError) as error:
        parse(tree, "F")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [A]\napp: x\nnames: [B]\n", "is not valid YAML: the key 'names' is there twice, in lines 1 and 3; keep one of them"),
        ("http: {port: 08080}\n", ": http.port='08080': '08080' has a 0 before its digits, which YAML takes for octal; leave it out"),
        ("http: {port: 010000}\n", ": http.port='010000': '010000' has a 0 before its digits"),
        ("start_timeout_s: 1:30\n", ": start_timeout_s='1:30': Input should be a valid number"),
    ],
)
def test_yaml_that_surprises_is_refused(tmp_path, text, message):
    (path := tmp_path / "service.yaml").write_text(text)
    with pytest.raises(ServiceConfigError) as error:
        load(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize("text", ["- a", "a: [", "\xff"])
def test_a_file_that_is_no_service_is_refused_by_name(tmp_path, text):
    path = tmp_path / "service.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ServiceConfigError, match=str(path)):
        load(path)
    with pytest.raises(ServiceConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_the_old_keys_are_the_defaults_of_every_pool():
    config = ToolsConfig(names=["A", "B"], num_replicas=2, num_cpus=0.5, max_in_flight=8, pools={"B": {"max_replicas": 5, "num_cpus": 1}})
    pools = [config.pool("A"), config.pool("B")]
    assert [(p.min_replicas, p.most_replicas, p.num_cpus, p.max_in_flight) for p in pools] == [(2, 2, 0.5, 8), (2, 5, 1, 8)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tools.pools.Other.num_cpus=1"], f"tools.pools.Other contradicts tools.names=['{CALCULATOR}']"),
        (["tools.names=[http]"], "tools.names=['http'] holds 'http', but that is the service's HTTP face"),
        (["tools.names=[A, A]"], "tools.names=['A', 'A'] holds a name twice"),
        (["tools.num_replicas=3", f"tools.pools.{CALCULATOR}.max_replicas=2"], f"tools.pools.{CALCULATOR}: max_replicas=2 contradicts"),
        (
            ["tools.app=shared", "tools.names=[Mine]", "tools.custom.Mine=mine.py:Mine"],
            "tools.app='shared' contradicts tools.custom={'Mine': ",
        ),
        (["tools.cache_size=-1"], "tools.cache_size=-1: input should be greater than or equal to 0"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_place_and_value(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("calculator", overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_files_are_named_absolutely_and_mcp_servers_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    custom = {"Mine": "tools/mine.py:Mine", "Files": "mcp:python server.py --root /data", "Other": "package.module:Other"}
    resolved = ToolsConfig(names=list(custom), custom=custom).custom
    assert resolved == custom | {"Mine": f"{tmp_path}/tools/mine.py:Mine"}


def test_the_folder_of_an_index_is_named_absolutely_and_a_prebuilt_one_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, expected in (("mine", str(tmp_path / "mine")), ("wikipedia-kilt-doc", "wikipedia-kilt-doc")):
        assert parse({"names": ["Wiki"], "options": {"Wiki": {"index": name, "k": 2}}}, "x").options["Wiki"] == {"index": expected, "k": 2}


def test_the_plan_counts_what_the_pools_ask_for_at_least_and_nothing_for_a_shared_service():
    pools = {"Wiki": {"min_replicas": 2, "max_replicas": 8, "num_cpus": 2}}
    config = RunConfig.model_validate({"recipe": "t", "tools": {"names": [CALCULATOR, "Wiki"], "pools": pools}})
    with pytest.raises(PlacementError, match=r"5.6 CPUs are needed \(rollout 1, learner 0.5, tools 4.1\) and 2 are there"):
        placement.check(placement.plan(config), {"CPU": 2.0}, [{"CPU": 2.0}])
    shared = RunConfig.model_validate({"recipe": "t", "tools": {"names": ["Wiki"], "app": "shared"}})
    assert [share.section for share in placement.plan(shared)] == ["rollout", "learner"]


def test_tools_of_a_running_service_are_made_by_nobody_here_and_refused_in_process():
    config = ToolsConfig(names=["Wiki"], app="shared")
    assert tool_factories(config) == {}
    with pytest.raises(ConfigError, match=r"tools\.app='shared' names a service on a Ray cluster"):
        LocalTools(config)


def test_a_tool_of_ones_own_is_made_with_its_options(tmp_path):
    (tmp_path / "shout.py").write_text(
        "class Shout:\n    name, description, idempotent = 'Shout', 'loud', True\n"
        "    def __init__(self, mark='!'):\n        self.mark = mark\n"
        "    def __call__(self, argument):\n        return argument.upper() + self.mark\n"
    )
    config = ToolsConfig(names=["Shout"], custom={"Shout": f"{tmp_path}/shout.py:Shout"}, options={"Shout": {"mark": "?"}})
    assert tool_factories(config)["Shout"]()("hey") == "HEY?"
    wrong = ToolsConfig(names=["Shout"], custom=config.custom, options={"Shout": {"marks": "?"}})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'marks'"):
        tool_factories(wrong)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ({"max_batch": 2, "idempotent": False}, "max_batch=2 contradicts idempotent=False"),
        ({"max_batch": 2, "stateful": True}, "max_batch=2 contradicts stateful=True"),
        ({"cacheable": True, "end_session": print}, "cacheable=True contradicts stateful=True"),
    ],
)
def test_statements_of_a_tool_that_contradict_each_other_are_refused(statements, message):
    with pytest.raises(ValueError, match=message):
        tool_info(type("T", (), {"name": "T", "description": "", "idempotent": True, **statements})())


def test_an_unknown_key_of_a_pool_is_refused():
    with pytest.raises(ValidationError, match="replicas"):
        ToolsConfig(pools={CALCULATOR: {"replicas": 2}})
