"""Every block of every document is run, literally, or says why not."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import llava
import notebooks
import pages
import pytest
import torch
import yaml
from documents import Block
from noise import LIGHTNING

from solidify.recipe import schema

pytestmark = [
    # The page stands in a copy of the README's directory, so PEFT finds the base elsewhere; a reader has but one.
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING),
]
README_RECIPE = yaml.safe_load(next(b.text for b in documents.ALL["README.md"] if b.file == "recipe.yaml"))


def every_block() -> list[Block]:
    return [block for page in documents.ALL.values() for block in page]


def run_blocks() -> list[Any]:
    """Returns the blocks that are run."""
    found = []
    for block in every_block():
        if block.not_run is None and block.language != "text" and not documents.runs_by_itself(block.document):
            found.append(pytest.param(block, id=block.case))
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
    if block.needs is not None:
        pytest.importorskip(block.needs, reason=f"needs {block.needs}")
    page(block.document).follow(block.line)


def test_every_block_is_run_or_says_why_not() -> None:
    assert [fault for block in every_block() for fault in documents.faults(block)] == []
    run = {parameter.values[0] for parameter in run_blocks()}
    for block in set(every_block()) - run:
        elsewhere = documents.runs_by_itself(block.document)
        assert elsewhere or block.language == "text" or block.not_run in documents.REASONS, block.place


@pytest.mark.parametrize("translation", documents.TRANSLATIONS)
def test_a_translation_has_the_blocks_of_the_original(translation: str) -> None:
    original = documents.TRANSLATIONS[translation]
    ours, theirs = ([(b.language, b.text, b.marks) for b in documents.ALL[name]] for name in (translation, original))
    assert ours == theirs, f"{translation} shows other blocks than {original}"


def test_the_tutorial_runs(tiny_base: Path, tmp_path: Path) -> None:
    """In a process of its own, for a notebook's classes are looked for in what was typed."""
    path = documents.ROOT / "docs" / "tutorial.ipynb"
    done = subprocess.run(
        [sys.executable, notebooks.__file__, str(path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    shown = notebooks.outputs_of(path)
    again = (
        "python tests/support/notebooks.py docs/tutorial.ipynb --write docs/tutorial.ipynb docs/tutorial.zh-CN.ipynb"
    )
    assert [bool(text) for text in printed] == [bool(text) for text in shown], f"{path.name} shows old outputs: {again}"
    assert shown == notebooks.outputs_of(path.with_name("tutorial.zh-CN.ipynb"))
    everything = "".join(printed)
    assert "Dimmed looks ahead" in everything
    assert "SolidOlmoeForCausalLM | Dimmed" in everything
    assert "'failed': 0" in everything


def test_a_cell_that_fails_ends_the_notebook(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": ["1 / 0"], "outputs": []}]
    (tmp_path / "wrong.ipynb").write_text(json.dumps({"cells": cells}))
    command = [sys.executable, notebooks.__file__, "wrong.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "cell 1 of wrong.ipynb: ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "block", [block for block in every_block() if block.not_run is not None], ids=lambda b: b.place
)
def test_a_block_that_is_not_run_can_at_least_be_read(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.place, "exec")
    elif block.language == "yaml":
        schema.Recipe.model_validate({**README_RECIPE, **yaml.safe_load(block.text)})
    else:
        assert block.language == "sh", "commands are judged in test_documents.py"


UNFIT = {
    "no language": ("```\nsolidify plan x\n```", "the language is ''"),
    "an unknown language": ("```ruby\nputs 1\n```", "the language is 'ruby'"),
    "a reason that is none": ("<!-- not run: boring -->\n```sh\nls\n```", "'boring' is no reason not to be run"),
    "a mark that is none": ("<!-- skip -->\n```sh\nls\n```", "unknown mark 'skip'"),
    "data for nobody": ("```json\n{}\n```", "JSON is not run"),
    "a command as text": ("```text\nsolidify run recipe.yaml\n```", "this text is code"),
    "Python as text": ("```text\nx = 1\n```", "this text is code"),
    "a recipe as text": ("```text\nbase: {model: x}\n```", "this text is code"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_a_block_that_would_not_be_run_is_found(fault: str) -> None:
    text, words = UNFIT[fault]
    (block,) = documents.blocks(text, "page.md")
    (found,) = documents.faults(block)
    assert words in found


def test_text_that_is_no_code_is_text() -> None:
    for text in ("src/solidify/\n├── cli.py   one command", "✓ Loading it in a fresh process", "0.5 0.7"):
        assert documents.faults(Block("page.md", 1, "text", text)) == []


WRONG = {
    "Python that fails": ("```python\n1 / 0\n```", "division by zero"),
    "a name from nowhere": ("```python\nmodel\n```", "name 'model' is not defined"),
    "a recipe with an unknown key": (
        "```yaml\nbase: {model: builtin:tiny-olmoe}\nsurgery: []\ndate: {}\n```",
        "date: unknown key",
    ),
    "a command of ours that fails": ("```sh\nsolidify plan none.yaml\n```", "`solidify plan none.yaml` ended in 2"),
    "any command that fails": ("```sh\ntrue\nfalse\n```", "`false` ended in 1"),
    "a stranger who needs us": (
        f"<!-- {documents.STRANGERS} -->\n```python\nimport solidify\n```",
        "import of solidify halted",
    ),
    "a stand-in for nothing": (
        "<!-- run with: builtin:tiny-olmoe for some/model -->\n```python\n1\n```",
        "'some/model' is not in the block",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_block_that_fails_is_seen_to(fault: str, tmp_path: Path) -> None:
    text, words = WRONG[fault]
    page = pages.Page(documents.blocks(text, "page.md"), tmp_path)
    (block,) = page.blocks
    with pytest.raises(Exception, match=re.escape(words)):
        page.follow(block.line)


def test_blocks_of_a_page_go_on_from_each_other(tmp_path: Path) -> None:
    text = "```python\n# helper.py\nx = 2\n```\n```python\nimport helper\n```\n```python\nassert helper.x == 2\n```\n"
    page = pages.Page(documents.blocks(text, "page.md"), tmp_path)
    page.follow(page.blocks[-1].line)
    assert (tmp_path / "helper.py").read_text() == "# helper.py\nx = 2\n"
    assert "helper" not in sys.modules
    page.follow(page.blocks[0].line)  # nothing is run twice


def test_the_recipe_that_is_shown_is_the_example_that_is_run() -> None:
    """The README's module computes what the example's does, so that one may be read for the other."""
    shown: dict[str, Any] = {}
    exec(next(block.text for block in documents.ALL["README.md"] if block.file == "side_path.py"), shown)
    example: dict[str, Any] = {}
    exec((documents.ROOT / "examples" / "side_path.py").read_text(), example)
    original, x = torch.nn.Linear(8, 8, bias=False), torch.randn(3, 8)
    ours, theirs = shown["SidePath"](original, width=4), example["SidePath"](original, width=4)
    torch.nn.init.normal_(ours.up.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
