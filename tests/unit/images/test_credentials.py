from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from sandbox.errors import ConfigError
from sandbox.images.credentials import Credentials, DockerConfig


def config(tmp_path: Path, content: object) -> DockerConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return DockerConfig.load(path)


def basic(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize("key", ["host:5000", "https://host:5000", "https://host:5000/v1/"])
def test_a_host_is_found_however_docker_wrote_it(tmp_path: Path, key: str) -> None:
    found = config(tmp_path, {"auths": {key: basic("me:pa:ss")}}).for_host("host:5000")
    assert found == Credentials(username="me", password="pa:ss")


def test_docker_hub_has_its_old_name(tmp_path: Path) -> None:
    loaded = config(tmp_path, {"auths": {"https://index.docker.io/v1/": basic("a:b")}})
    assert loaded.for_host("docker.io") == Credentials(username="a", password="b")
    assert loaded.for_host("quay.io") is None


def test_an_identity_token_replaces_the_password(tmp_path: Path) -> None:
    loaded = config(tmp_path, {"auths": {"h.io": {**basic("u:p"), "identitytoken": "t"}}})
    found = loaded.for_host("h.io")
    assert found is not None
    assert found.identity_token == "t"


def test_a_credential_helper_is_named_instead_of_pulling_anonymously(tmp_path: Path) -> None:
    loaded = config(tmp_path, {"auths": {"h.io": {}}, "credsStore": "pass"})
    with pytest.raises(ConfigError, match="docker-credential-pass"):
        loaded.for_host("h.io")


@pytest.mark.parametrize("text", ["nocolon", ":password"])
def test_credentials_without_a_user_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="user:password"):
        config(tmp_path, {"auths": {"h.io": basic(text)}}).for_host("h.io")


@pytest.mark.parametrize("content", [[], {"auths": []}, {"auths": {"h": {"auth": 3}}}])
def test_a_file_that_is_not_dockers_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        config(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        DockerConfig.load(tmp_path / "nothing-here")


def test_a_password_is_in_no_representation() -> None:
    secret = Credentials(username="me", password="hunter2", identity_token="tok")
    assert "hunter2" not in repr(secret) + str(secret) + f"{[secret]}"
    assert "tok" not in repr(secret)
