"""Fixtures that cost: the embedded base model, and artifacts that many tests read. All real, none mocked."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import slow

HERE = Path(__file__).parent
# Heavy imports stand in the fixtures: the process that only hands out tests to others reads this file, too.


# Files that take long, though they hold few tests. They begin first, so that no process is left alone with one at the
# end; those from the second to `test_masks.py` need no base, so that they run while the first has the base trained.
LONG = (
    "test_blocks.py",
    "test_faults.py",
    "artifact/test_large.py",
    "artifact/test_solidify.py",
    "merging/test_export.py",
    "adapter/test_buffers.py",
    "merging/test_agreement.py",
    "source/test_closure.py",
    "test_families.py",
    "surgery/test_masks.py",
    "system/test_processes.py",
    "command/test_cli.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {HERE / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG)))
    cases = []
    for item in items:
        test, _, case = item.nodeid.partition("::")[2].partition("[")
        cases.append((f"{item.path.relative_to(HERE).as_posix()}::{test}", case.removesuffix("]")))
        if slow.is_slow(*cases[-1]):
            item.add_marker("slow")
    some = any("::" in argument for argument in config.args) or config.getoption("lf", False)  # cases of a test alone
    if not some and (missed := slow.find_missed(cases)):
        raise pytest.UsageError(f"tests/support/slow.py keeps cases that are not there: {', '.join(missed)}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports the tests without a look for garbage in between, and leaves what was imported out of later looks."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 10)  # what tests import later is looked through a few times, and not hundreds
        gc.enable()


@pytest.fixture(autouse=True)
def quiet_and_seeded() -> None:
    from transformers.utils import logging

    from solidify.behaviour import calling

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    calling.set_seed(0)


@pytest.fixture(autouse=True, scope="module")
def looked_through() -> Iterator[None]:
    """Leaves what a file of tests leaves behind out of later looks for garbage: each trainer that begins has one."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Iterator[None]:
    """Waits for no disk: what outlives a power cut is told by `system/test_disk.py`, from the calls and by strace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def forked_processes() -> Iterator[None]:
    """Fresh processes begin as forks of one that has done the imports."""
    import forks

    from solidify.system.alone import Alone

    started = forks.Forks()
    with pytest.MonkeyPatch.context() as patch:
        for name, method in started.methods().items():
            patch.setattr(Alone, name, method)
        yield
    started.close()


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The embedded OLMoE, trained on first use (a minute or two)."""
    from solidify.builtin import tiny_olmoe

    return tiny_olmoe.directory()


@pytest.fixture(scope="session")
def trash_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico OLMoE with a trash can in every block."""
    import pico

    import solidify
    from solidify.modules.trashcan_moe import TrashCanMoE

    directory = tmp_path_factory.mktemp("artifacts") / "trash"
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE, expect="OlmoeSparseMoeBlock", count=2)
    pico.artifact(model, edits, directory)
    return directory


@pytest.fixture(scope="session")
def wrapped_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico OLMoE with bottlenecks beside o_proj (linear layers and a bare parameter) and scaled MLPs."""
    import pico

    import solidify

    directory = tmp_path_factory.mktemp("artifacts") / "wrapped"
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.self_attn.o_proj", pico.wrappers.Bottleneck, arguments={"width": 4})
    edits += solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    pico.artifact(model, edits, directory)
    return directory


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory so that a test may spoil it."""

    def copy(source: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    return copy
