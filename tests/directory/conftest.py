"""Fixtures of signatures: keys, a signed artifact, and a machine without a network."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from signatures import Pair, pair

import solidify


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def mine(home: Path) -> Pair:
    return pair(ec.generate_private_key(ec.SECP256R1()), home, "mine")


@pytest.fixture(scope="module")
def other(home: Path) -> Pair:
    return pair(ec.generate_private_key(ec.SECP384R1()), home, "other")


@pytest.fixture(scope="module")
def signed(trash_artifact: Path, mine: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(trash_artifact, tmp_path_factory.mktemp("signed") / "artifact"))
    solidify.sign(directory, mine.private)
    return directory


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something went over a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
