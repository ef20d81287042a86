"""Every block of every document is run, literally, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import documents
import pages
from documents import Block

RUN = [block for page in documents.ALL.values() for block in page if block.not_run is None and block.language != "text"]


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
            made[document] = pages.Page(blocks, directory)
        return made[document]

    return of


def with_errors_kept(page: pages.Page) -> None:
    """Follows a page to its end; its own tests tell what failed."""
    with pytest.MonkeyPatch.context():
        for block in page.blocks:
            try:
                page.follow(block.line)
            except (Exception, SystemExit):
                continue


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.place)
def test_a_block_runs_as_it_stands(page: Callable[[str], pages.Page], block: Block) -> None:
    page(block.document).follow(block.line)
