"""The agent's configuration: what it refuses, and in which words, and what the guide says."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from sandbox.agent.config import Config, read_config
from sandbox.control.capacity import Capacity
from sandbox.errors import ConfigError

GUIDE = Path(__file__).parents[2] / "docs/guide/agent.md"
REFUSED = [
    ({"max_tasks": -1}, "max_tasks: expected `int` >= 0"),
    ({"max_tasks": "many"}, "max_tasks: expected `int`, got `str`"),
    ({"warm_slots": -3}, "warm_slots: expected `int` >= 0"),
    ({"warm_slots": 10**9}, "warm_slots: expected `int` <= 1024"),
    ({"region": ""}, "region: expected `str` matching regex"),
    ({"region": "us-east-1\n"}, "region: expected `str` matching regex"),
    ({"account_id": "x"}, "account_id: expected `str` matching regex"),
    ({"account_id": 123456789012}, "account_id: expected `str`, got `int`"),
    ({"host_free_memory_mib": -1}, "host_free_memory_mib: expected `int` >= 0"),
    ({"memory_overcommit": 0}, "memory_overcommit: expected `float` > 0"),
    ({"cpu_overcommit": -1.5}, "cpu_overcommit: expected `float` > 0"),
    ({"stopped_tasks_kept": -1}, "stopped_tasks_kept: expected `int` >= 0"),
    ({"stopped_tasks_kept_s": -1}, "stopped_tasks_kept_s: expected `int` >= 0"),
    ({"insecure_registries": ["a", ""]}, "insecure_registries[1]: expected `str` of length >= 1"),
    ({"docker_config": ""}, "docker_config: expected `str` of length >= 1"),
    ({"era": "2018"}, "era: invalid enum value '2018'"),
    ({"max_task": 1}, "object contains unknown field `max_task`"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED)
def test_nonsense_is_refused_with_its_key_in_one_line(
    settings: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(settings)
    assert str(raised.value).startswith(f"configuration: {text}")
    assert "\n" not in str(raised.value)


def test_what_is_sensible_is_taken() -> None:
    assert read_config({}) == Config()
    for settings in (
        {"max_tasks": 0, "warm_slots": 0, "stopped_tasks_kept": 0, "stopped_tasks_kept_s": 0},
        {"region": "us-gov-west-1", "account_id": "000000000000", "memory_overcommit": 2},
        {"era": "2017", "insecure_registries": ["registry.local:5000"]},
    ):
        assert read_config(settings) != Config()


# The guide ---------------------------------------------------------------------------------


def test_the_guide_tells_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", GUIDE.read_text(), re.M)
    told = {key: None if default == "none" else toml(default.strip("`")) for key, default in rows}
    defaults = {field.name: field.default for field in msgspec.structs.fields(Config)}
    assert len(rows) == len(told)
    assert told == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


def test_the_guides_example_is_a_configuration() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert read_config(tomllib.loads(example)) != Config()


def test_the_guide_tells_which_settings_a_running_agent_takes_over() -> None:
    """Those that `Agent.reload` and retention read; all others are used once, at the start."""
    (sentence,) = re.findall(
        r"^SIGHUP changes (.*?) of a\s+running", GUIDE.read_text(), re.M | re.S
    )
    names = re.findall(r"`(\w+)`", sentence)
    limits = {field.name for field in dataclasses.fields(Capacity)} - {"memory"}
    assert set(names) == limits | {"era", "stopped_tasks_kept", "stopped_tasks_kept_s"}


def toml(value: str) -> object:
    return tomllib.loads(f"x = {value}")["x"]
