"""What the documents say of the repository is so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import documents
import pytest
import vocabulary
from documents import DOCUMENTS, ROOT

import solidify
from solidify.command.cli import app
from solidify.recipe import schema

TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_and_file_that_is_named_exists(document: Path) -> None:
    text = documents.text_of(document)
    for file, name in TEST.findall(text):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{document.name} names {file}::{name}"
    assert vocabulary.wrong_links(text, document.parent) == []


def test_at_least_thirty_traps_are_listed_each_with_a_test() -> None:
    rows = [line for line in text_of("traps.md").splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 30
    assert all(TEST.search(row) for row in rows)


def test_every_trap_test_is_listed() -> None:
    listed = {name for _, name in TEST.findall(text_of("traps.md"))}
    for path in (ROOT / "tests" / "traps").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            assert name in listed, f"docs/traps.md lacks {path.name}::{name}"


def test_the_steps_refer_to_traps_that_are_there() -> None:
    count = len(re.findall(r"^\| \d+ \|", text_of("traps.md"), re.MULTILINE))
    numbers = [
        int(n) for group in re.findall(r"\[(\d+(?:, \d+)*)\]", text_of("from_a_script.md")) for n in group.split(", ")
    ]
    assert numbers
    assert max(numbers) <= count


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_starts_with_its_command_and_fits_a_screen(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# solidify run examples/{path.name}")
    assert len(lines) <= 40
    schema.load(path)


def test_every_verb_is_documented() -> None:
    for command in app.registered_commands:
        assert f"solidify {command.name or command.callback.__name__}" in text_of("recipe.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_name_and_parameter_that_is_mentioned_exists(document: Path) -> None:
    text, blocks = documents.text_of(document), documents.ALL[document.name]
    code = [*vocabulary.spans(text), *(block.text for block in blocks if block.language == "python")]
    commands = [line for block in blocks if block.language == "sh" for line in block.text.splitlines()]
    assert vocabulary.wrong_options(text) == []
    assert vocabulary.wrong_commands(commands) == []
    assert vocabulary.wrong_names(text) == []
    assert vocabulary.wrong_keys(text) == []
    assert [wrong for each in code for wrong in vocabulary.wrong_calls(each)] == []


def test_what_does_not_exist_is_found() -> None:
    assert vocabulary.wrong_options("`solidify chekc DIR`, `--jsno`") == [
        "solidify has no verb 'chekc'",
        "no verb of solidify has an option --jsno",
    ]
    assert vocabulary.wrong_options("`solidify run RECIPE [--output DIR] [--resmue]`") == [
        "solidify run has no option --resmue"
    ]
    assert vocabulary.wrong_commands(["python benchmarks/scale.py --size full --sise 3"]) == [
        "benchmarks/scale.py has no option --sise"
    ]
    assert vocabulary.wrong_options("`make tset`, `make bench-full BENCH_KEEP=DIR`") == ["make has no target tset"]
    assert vocabulary.wrong_commands(["torchrun --nproc-per-node 2 -m solidify run recipe.yaml --outptu x"]) == [
        "solidify run has no option --outptu"
    ]
    assert vocabulary.wrong_names("`solidify.lod(x)`, `solidify.losses:kl_to_bace`, `solidify.json`") == [
        "there is no solidify.lod",
        "there is no solidify.losses:kl_to_bace",
    ]
    assert vocabulary.wrong_names("`Edit.tensor` and `Edit.tensors`") == ["Edit has no tensor"]
    assert vocabulary.wrong_names("`losses.forward_lk`") == ["there is no loss forward_lk"]
    assert vocabulary.wrong_keys("`data.images`, `training.fsdp`, `data.image`") == [
        "a recipe's section data has no key images"
    ]
    links = '[e]: docs/no.md\n\n<img src="docs/no.svg"> `[x](y.md)` [f](README.md "a title") [g](https://x.org/y.md)\n'
    assert vocabulary.wrong_links(links, ROOT) == ["there is no docs/no.md", "there is no docs/no.svg"]
    assert vocabulary.wrong_links("# A\n## A\n## A `b` [c](https://x.org)\n[1](#a-1) [2](#a-b-c) [3](#a-2)", ROOT) == [
        "there is no heading #a-2"
    ]
    links = "[a](docs/scale.md#hard-links), [b](docs/scale.md#soft), [c](docs/none.md), [d](#there)\n# There\n"
    assert vocabulary.wrong_links(links, ROOT) == ["there is no heading docs/scale.md#soft", "there is no docs/none.md"]
    assert vocabulary.wrong_calls("solidify.replace(model, 'x', X, exepct='Y', count=1)") == [
        "replace has no parameter 'exepct'"
    ]


SITE = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def site() -> Any:
    """Returns docs/lay_out.py, which is a script of the site and no part of a package."""
    specification = importlib.util.spec_from_file_location("lay_out", ROOT / "docs" / "lay_out.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def pages_in(navigation: Any) -> list[str]:
    """Returns the pages that a navigation names, in order, each as often as it does."""
    if isinstance(navigation, str):
        return [navigation]
    values = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for value in values for page in pages_in(value)]


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    named = pages_in(SITE["nav"])
    assert pages_in([{"A": "a.md"}, {"B": [{"C": "c.md"}, "a.md"]}]) == ["a.md", "c.md", "a.md"]
    assert sorted(named) == sorted(site().pages())


def test_every_page_is_listed_among_all_pages() -> None:
    """The index is what a reader of the repository has in the place of the site's navigation."""
    listed = set(re.findall(r"\]\((?:\.\./)?([\w.-]+)(?:#[^)]*)?\)", text_of("index.md")))
    written = {path.name for path in DOCUMENTS if path.parent.name == "docs"} | {"README.md", "CONTRIBUTING.md"}
    assert sorted(written - {"index.md"} - listed) == []


def test_no_link_of_the_site_leads_nowhere(tmp_path: Path) -> None:
    site().write(tmp_path)
    for path in tmp_path.glob("*.md"):
        assert vocabulary.wrong_links(path.read_text(encoding="utf-8"), tmp_path) == [], path.name


def test_a_link_out_of_the_site_keeps_its_words() -> None:
    there = {
        "CONTRIBUTING.md": "CONTRIBUTING.md",
        "README.md": "index.md",
        "docs/f.ipynb": "f.md",
        "docs/h.svg": "h.svg",
    }
    links = "[a](../CONTRIBUTING.md#b) [c](../tests/d.py) [e](f.ipynb) [g](https://x.org)"
    code = "\n```sh\n[a](../README.md)\n```\n"
    led = site().with_links_among(links + code, "docs", there)
    assert led == "[a](CONTRIBUTING.md#b) c [e](f.md) [g](https://x.org)" + code
    assert site().with_links_among("![h](docs/h.svg) [i](README.md)", "", there) == "![h](h.svg) [i](index.md)"


def test_the_reference_holds_all_that_is_public() -> None:
    """Each name by itself: a star of a documentation tool would also show what is not meant."""
    shown = {
        name: re.findall(r"^::: ([\w.]+)$", text_of(name), re.MULTILINE)
        for name in ("reference.md", "reference_losses.md")
    }
    assert set(shown["reference.md"]) ^ {f"solidify.{name}" for name in solidify.__all__} == set()
    terms = [name for name in solidify.losses.__all__ if not name.isupper()]  # names in capitals are constants
    assert set(shown["reference_losses.md"]) ^ {f"solidify.losses.{name}" for name in terms} == set()
    assert all(len(names) == len(set(names)) for names in shown.values())


def test_a_translation_stands_at_the_top_of_the_readme_and_leads_back() -> None:
    assert "(README.zh-CN.md)" in (ROOT / "README.md").read_text(encoding="utf-8")[:200]
    assert "(README.md)" in (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")[:200]
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def module_names() -> set[str]:
    """Returns the names of all modules that examples and documents have a user write."""
    written = {path.stem for path in (ROOT / "examples").glob("*.py")}
    for document in DOCUMENTS:
        blocks = documents.ALL[document.name]
        written |= {block.file.removesuffix(".py") for block in blocks if (block.file or "").endswith(".py")}
        written |= set(re.findall(r"\b(\w+)\.py:[A-Za-z]\w*", document.read_text()))
    return written - {"file"}  # `file.py:Name` says how references are written


def test_no_module_of_an_example_stands_in_for_a_package() -> None:
    """Python finds what lies beside a script first, also for whoever else imports a package of that name."""
    names = module_names()
    assert "side_path" in names
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(importlib.metadata.packages_distributions())
    assert vocabulary.importers(names | {"bottleneck"}) == {"bottleneck": ["pandas/nanops.py"]}  # which is to be found
