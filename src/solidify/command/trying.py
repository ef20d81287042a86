"""The verb that tries a model: it continues a text or chats, with several adapters side by side if asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from solidify.builtin import names
from solidify.command.quiet import start_verb

Speakers = dict[str, Callable[[], Any]]  # what each is called, and what to enter while it speaks


def generate(
    model: Annotated[str, typer.Argument(help="An artifact, a stock model: a directory, a hub id, or builtin:NAME.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue; with --chat, the one message.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", help="An adapter to put on it; repeated, they answer side by side."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk to it, in the form of its chat template; a line is a message.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="The first message of a chat, of the system.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The largest number of tokens to write.")
    ] = 64,
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="How adapters of others lay out experts, where nothing tells: peft, grouped."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of an artifact built elsewhere.")
    ] = False,
) -> None:
    """Continues a text greedily, or chats, to try a model."""
    names.refuse_unknown(model)
    with start_verb():
        from solidify.command import generation
        from solidify.errors import DataError

    if prompt is None and not chat:
        raise DataError("there is nothing to say; give a text to continue (--prompt), or talk to it (--chat)")
    if system is not None and not chat:
        raise DataError("--system is the first message of a chat; give --chat too")
    loaded, tokenizer = _load(model, trust_remote_code)
    loaded, speakers = _put_on(loaded, adapter or [], layout)
    if not chat:
        assert prompt is not None
        _hint_at_chat(tokenizer)
        for name, entered in speakers.items():
            with entered():
                _say(name, generation.continued(loaded, tokenizer, prompt, max_new_tokens), len(speakers))
        return
    first = [{"role": "system", "content": system}] if system is not None else []
    histories: dict[str, generation.Messages] = {name: list(first) for name in speakers}
    for message in [prompt] if prompt is not None else _read_lines():
        for name, entered in speakers.items():
            histories[name].append({"role": "user", "content": message})
            with entered():
                answer = generation.replied(loaded, tokenizer, histories[name], max_new_tokens)
            histories[name].append({"role": "assistant", "content": answer})
            _say(name, answer, len(speakers))


def _load(model: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Returns a model and its tokenizer, of an artifact or of a stock model."""
    from solidify.artifact import loading
    from solidify.builtin import bases
    from solidify.directory import manifest
    from solidify.errors import ModelError

    if manifest.kind(Path(model)) in manifest.MODELS:
        found = loading.load_artifact(model, trust_remote_code=trust_remote_code)
        return found, loading.load_tokenizer(model, trust_remote_code=trust_remote_code)
    where = str(bases.directory(model) or model)
    base = loading.load_base(where, trust_remote_code=trust_remote_code, quantized=True)
    if base.tokenizer is None:
        raise ModelError(f"{model} has no tokenizer, so it cannot be given a text")
    return base.model, base.tokenizer


def _put_on(model: Any, adapters: list[Path], layout: str | None) -> tuple[Any, Speakers]:
    """Puts adapters on a model; returns it, and who speaks: each adapter, and the model without any beside several."""
    from solidify.adapter import storage

    if not adapters:
        return model, {"": nullcontext}
    names = _name_apart(adapters)
    for name, directory in zip(names, adapters, strict=True):
        model = storage.load_adapter(model, directory, name=name, layout=layout)
    if len(names) == 1:
        return model, {names[0]: nullcontext}

    def switched(name: str) -> Callable[[], Any]:
        return lambda: nullcontext(model.set_adapter(name, inference_mode=True))

    return model, {"without an adapter": model.disable_adapter, **{name: switched(name) for name in names}}


def _name_apart(adapters: list[Path]) -> list[str]:
    """Names adapters by the shortest ends of their paths that tell them apart; PEFT allows no dot in a name."""
    for count in range(1, 8):
        names = ["/".join(path.resolve().parts[-count:]).replace(".", "_") for path in adapters]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _hint_at_chat(tokenizer: Any) -> None:
    from solidify.system import console

    if getattr(tokenizer, "chat_template", None):
        console.words.print("The text is continued as it is; --chat would put it into the model's chat template.")


def _say(name: str, text: str, speakers: int) -> None:
    """Prints what was written, under the name of who wrote it where there are several."""
    from solidify.system import console

    if speakers > 1:
        console.results.print(console.line((name, "bold")))
    console.write(text)


def _read_lines() -> Iterator[str]:
    """Yields lines of the standard input, on a terminal after a mark, until it ends."""
    from solidify.system import console

    asks = sys.stdin.isatty() and console.words.is_terminal
    while True:
        if asks:
            console.words.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
