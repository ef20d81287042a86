"""Every block of every document is run, literally, or says why not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import documents
import llava
import pages
from documents import Block
from test_contract import LIGHTNING

pytestmark = [
    # The page stands in a copy of the README's directory, so PEFT finds the base elsewhere; a reader has but one.
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING),
]
SHORT_RUN = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a run of fewer steps than logging_steps has no logs, and a check of them fails on that (S17)",
)


def run_blocks() -> list[Any]:
    """Returns the blocks that are run; what is known to fail, is said to."""
    found = []
    for block in (block for page in documents.ALL.values() for block in page):
        if block.not_run is None and block.language != "text":
            waits = block.document == "README.md" and "solidify run recipe.yaml" in block.text
            found.append(pytest.param(block, id=block.place, marks=[SHORT_RUN] if waits else []))
    return found


@pytest.fixture(scope="module")
def page(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pages.Page]:
    """Returns a document's page, made once; one that goes on from the README's stands in a copy of its directory."""
    made: dict[str, pages.Page] = {}

    def of(document: str) -> pages.Page:
        if document not in made:
            blocks = documents.ALL[document]
            directory = tmp_path_factory.mktemp("page") / Path(document).stem
            if pages.goes_on(blocks):
                readme = of("README.md")
                with_errors_kept(readme)
                pages.linked(readme.directory, directory)
            else:
                directory.mkdir()
                if document == "multimodal.md":
                    llava.base(directory / "tiny-llava")  # in the place of what would be downloaded
            made[document] = pages.Page(blocks, directory)
        return made[document]

    return of


def with_errors_kept(page: pages.Page) -> None:
    """Follows a page to its end; its own tests tell what failed."""
    for block in page.blocks:
        with contextlib.suppress(Exception, SystemExit):
            page.follow(block.line)


@pytest.mark.parametrize("block", run_blocks())
def test_a_block_runs_as_it_stands(page: Callable[[str], pages.Page], block: Block) -> None:
    page(block.document).follow(block.line)
