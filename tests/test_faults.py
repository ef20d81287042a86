"""Killed at any moment, a full disk, inputs that are not whole: nothing half-written, one message, and a way on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from blake3 import blake3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import solidify
from solidify.directory import manifest, trust, writing
from solidify.errors import AdapterError, ArtifactError
from training import awake

FORKED = Path(__file__).parent / "faults" / "forked.py"
HIDDEN = re.compile(r"\.\w+\.(partial|replaced|scratch)-\d+")
RECIPE = """
base: {{model: {base}}}
surgery:
  - replace: model.layers.0.self_attn.o_proj
    expect: Linear
    with: wrappers.py:Bottleneck
    arguments: {{width: {width}}}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, its words, and the changes of files that it made or was about to make."""

    code: int
    out: str
    err: str
    changes: list[str]

    def refused(self, *words: str) -> None:
        """Asserts that there was one message with some words in it, exit code 2 and no traceback."""
        assert self.code == 2, self.err
        assert self.err.count("solidify: ") == 1
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err


Command = Callable[..., Ended]


@dataclass
class World:
    """A directory with bases and recipes, and how to run commands in it."""

    root: Path
    command: Command

    def recipe(self, base: str, width: int = 4) -> Path:
        """Writes the recipe of a build on a base."""
        path = self.root / f"{base}-{width}.yaml"
        path.write_text(RECIPE.format(base=base, width=width))
        return path

    def build(self, base: str, output: Path, width: int = 4, **options: Any) -> Ended:
        """Builds on a base; what a build plans first, and writes nothing for, is left out."""
        options["before"] = "import solidify.recipe.stages as p; p.plan = lambda recipe: None\n" + options.get(
            "before", ""
        )
        return self.command("build", self.recipe(base, width), "--output", output, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two bases in several files (one in the hub's layout, one as it stands in memory), and a process that has
    imported everything and forks for each command; `kill`, `full` and others interfere (see faults/forked.py)."""
    root = Path(tempfile.mkdtemp(prefix="faults-"))  # not below pytest's directory, which is root's alone
    root.chmod(0o755)
    pico.olmoe().save_pretrained(root / "hub", max_shard_size="20KB")
    pico.llama().save_pretrained(root / "memory", max_shard_size="20KB")
    shutil.copy(pico.HERE / "user_modules" / "wrappers.py", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOLIDIFY_HOME", str(root / "cache"))
        patch.setenv("HF_MODULES_CACHE", str(root / "cache" / "modules"))
        made = World(root, lambda: None)
        process = subprocess.Popen(
            [sys.executable, FORKED, made.recipe("hub"), made.recipe("memory")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def command(*words: Any, **options: Any) -> Ended:
            assert process.stdin is not None
            assert process.stdout is not None
            job = {"words": [str(word) for word in words], "below": str(root), **options}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            ended = Ended(**json.loads(process.stdout.readline()))
            if ended.code == 77:
                pytest.skip("mounting is not allowed here")
            return ended

        yield World(root, command)
        process.communicate()
    shutil.rmtree(root)


def contents(directory: Path) -> dict[str, tuple[str, int]]:
    """Returns digest and time of modification of every file."""
    return {
        str(path): (blake3(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def points(kinds: list[str], *, every: bool | None, first: bool = True, last: bool = True) -> list[tuple[str, int]]:
    """Returns at which changes to kill, as a kind and its how-manieth: all, or the first and last of each kind, or half
    of these (None)."""
    counted = [(kind, kinds[: number + 1].count(kind)) for number, kind in enumerate(kinds)]
    if every:
        return counted
    ends = {kind: {1} if first else set() for kind in kinds if "/cache/digests" not in kind}
    for kind, numbers in ends.items():
        numbers.update({kinds.count(kind)} if last else ())
    found = [(kind, number) for kind, number in counted if number in ends.get(kind, ())]
    return found if every is not None else found[::2]


def state(directory: Path) -> frozenset[str]:
    """Returns what stands in a directory, whichever process made it."""
    if not directory.is_dir():
        return frozenset()
    return frozenset(re.sub(r"-\d+$", "", path.name) for path in directory.iterdir())


def whole(directory: Path) -> None:
    """Asserts that a result is as its manifest says, and that its code may run."""
    record = manifest.read(directory)
    assert manifest.faults(directory, record, fresh=True) == []
    if record.code:
        trust.require(record, directory, False)


def kill_everywhere(
    run: Callable[..., Ended], output: Path, inputs: list[Path], *, old: Path | None = None, **where: bool | None
) -> None:
    """Kills a command at every point, each time over what the killed ones before have left.

    Whenever what is left is of a new kind, a run that nobody kills must complete and leave nothing but its result.
    `old` is a result that stands at the output before, and must stand there until the new one does.
    """

    def begin() -> None:
        shutil.rmtree(output, ignore_errors=True)
        if old is not None:
            shutil.copytree(old, output)

    before = {path: contents(path) for path in inputs}
    begin()
    plain = run()
    assert plain.code == 0, plain.err
    known = [manifest.read(path).tensors for path in (output, old) if path is not None]
    begin()
    seen, killed = set(), 0
    for kind, number in points(plain.changes, **where):
        ended = run(kill=(kind, number))
        if ended.code == 0 and ended.changes.count(kind) < number:
            begin()
            continue  # what a killed run left makes this change needless
        killed += 1
        assert ended.code == -signal.SIGKILL, (kind, number, ended.err)
        assert all(HIDDEN.fullmatch(path.name) for path in output.parent.glob("*") if path != output)
        assert old is None or output.exists(), kind
        if output.exists():
            whole(output)
            assert manifest.read(output).tensors in known
        assert {path: contents(path) for path in inputs} == before, kind
        left = state(output.parent)
        if left not in seen:
            seen.add(left)
            again = run()
            assert again.code == 0, again.err
            whole(output)
            assert manifest.read(output).tensors == known[0]
            assert [path.name for path in output.parent.iterdir()] == [output.name]
            assert {path: contents(path) for path in inputs} == before
            begin()
    assert killed >= (12 if where["every"] is not None else 6)
    assert len(seen) >= 2


EVERY = [pytest.param(every, marks=pytest.mark.slow) for every in (False, True)]


@pytest.mark.parametrize("every", [None, *EVERY])
def test_a_build_is_killed(world: World, every: bool | None) -> None:
    """A base in the hub's layout is converted first; nothing stands at the output."""
    output, base = world.root / "killed" / "artifact", world.root / "hub"
    kill_everywhere(lambda **o: world.build("hub", output.parent, **o), output, [base], every=every, last=False)


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_a_build_over_an_older_one_is_killed(world: World, every: bool) -> None:
    """Files of the base are linked; the older result stands until the new one does."""
    output, old = world.root / "older" / "artifact", world.root / "three"
    assert world.build("memory", old, 3).code == 0
    kill_everywhere(
        lambda **o: world.build("memory", output.parent, **o),
        output,
        [world.root / "memory"],
        old=old / "artifact",
        every=every,
        first=False,
    )


@pytest.fixture(scope="module")
def artifact(world: World) -> Path:
    """An artifact in several files."""
    ended = world.build("memory", world.root / "standing", link=False)
    assert ended.code == 0, ended.err
    return world.root / "standing" / "artifact"


@pytest.fixture(scope="module")
def adapter(world: World, artifact: Path) -> Path:
    """An adapter of it."""
    model = awake(artifact, lora={"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]})
    return solidify.save_adapter(model, world.root / "adapter")


@pytest.fixture(scope="module")
def plain(world: World) -> Path:
    """An adapter of PEFT's own for the base in the hub's layout."""
    base = AutoModelForCausalLM.from_pretrained(world.root / "hub")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(world.root / "plain")
    return world.root / "plain"


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_a_merge_is_killed(world: World, artifact: Path, adapter: Path, every: bool) -> None:
    """Over an older result."""
    output, old = world.root / "merging" / "merged", world.root / "merged-before"
    assert world.command("merge", adapter, "--output", old, "--copy").code == 0
    kill_everywhere(
        lambda **o: world.command("merge", adapter, "--output", output, **o),
        output,
        [artifact, adapter],
        old=old,
        every=every,
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_a_merge_into_a_stock_model_is_killed(world: World, plain: Path, every: bool) -> None:
    output, base = world.root / "stock" / "merged", world.root / "hub"
    kill_everywhere(
        lambda **o: world.command("merge", plain, "--output", output, "--base", base, **o),
        output,
        [base, plain],
        every=every,
    )


@pytest.mark.parametrize("base", ["hub", pytest.param("memory", marks=pytest.mark.slow)])
def test_the_disk_becomes_full(world: World, base: str) -> None:
    """In the middle, at whichever change of files: from there on nothing more can be made."""
    output = world.root / "full"
    before = contents(world.root / base)
    plain = world.build(base, output)
    assert plain.code == 0, plain.err
    shutil.rmtree(output)
    refused = 0
    for kind, number in points(plain.changes, every=False):
        if kind.startswith(("os.rmdir", "os.remove", "os.rename", "open /cache")) or number > 1:
            continue
        ended = world.build(base, output, full=(kind, number))
        if ended.code:
            ended.refused()
            assert "became full" in ended.err or "cannot be written to: No space left" in ended.err
            assert not output.exists(), kind
            refused += 1
        else:
            shutil.rmtree(output)
    assert refused >= 8
    assert contents(world.root / base) == before


@pytest.mark.slow
def test_a_small_disk(world: World, plain: Path) -> None:
    """A real one, of growing size: what is needed and what is free is said as soon as it is known."""
    disk = world.root / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in (world.root / "hub").iterdir())
    ends = []
    for share in (0.3, 0.9, 1.1, 1.2, 1.5, 4.0):
        options = {"mounts": [f"mount -t tmpfs -o size={int(share * needed)} tmpfs {disk}"], "list": str(disk)}
        for large in (True, False):
            ended = world.build("hub", disk / "out", **options, large=large)
            complete = ended.code == 0 or "a check failed" in ended.err  # the module does not start as the identity
            ends.append(complete)
            if not complete:
                ended.refused("free", "make room, or choose another output")
                assert ended.err.splitlines()[-1].strip() == "left:"
    assert set(ends) == {True, False}
    merged = world.command("merge", plain, "--output", disk / "out", "--base", world.root / "hub", **options)
    assert merged.code == 0
    options["mounts"] = [f"mount -t tmpfs -o size={needed // 2} tmpfs {disk}"]
    merged = world.command("merge", plain, "--output", disk / "out", "--base", world.root / "hub", **options)
    merged.refused("free", "make room, or choose another output")
    assert merged.err.splitlines()[-1].strip() == "left:"


def spoil(directory: Path, fault: str) -> None:
    """Breaks the second of a directory's weight files, or what is said of it."""
    path = sorted(directory.glob("*.safetensors"))[:2][-1]
    index = directory / "model.safetensors.index.json"
    document = json.loads(index.read_text()) if index.is_file() else {"weight_map": {}}
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "header":
        content = path.read_bytes()
        path.write_bytes(content[:9] + bytes([content[9] ^ 0xFF]) + content[10:])
    elif fault == "longer header":
        path.write_bytes(path.read_bytes()[:3] + b"\xff" + path.read_bytes()[4:])
    elif fault == "gone":
        path.unlink()
    elif fault == "a directory":
        path.unlink()
        path.mkdir()
    elif fault == "no index":
        index.write_text('{"weight_map":')
    elif fault == "another index":
        index.write_text('["weight_map"]')
    else:
        state = load_file(path)
        name = next(name for name, tensor in state.items() if tensor.ndim == 2)
        if fault == "twice":
            shutil.copy(path, directory / "extra.safetensors")
            document["weight_map"]["another"] = "extra.safetensors"
        elif fault == "missing tensor":
            del state[name]
            document["weight_map"].pop(name, None)
        elif fault == "shape":
            state[name] = torch.zeros(3, 5)
        save_file(state, path, metadata={"format": "pt"})
        index.write_text(json.dumps(document))


FAULTS = {
    "truncated": "truncated",
    "empty": "cannot be read as safetensors",
    "header": "cannot be read as safetensors",
    "longer header": "its header is longer than the file",
    "gone": "names model-00002-of-",
    "a directory": "names model-00002-of-",
    "no index": "is not a safetensors index",
    "another index": "is not a safetensors index",
    "twice": "which another file holds too",
    "missing tensor": "missing_keys",
    "shape": "mismatched_keys",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_base_that_is_not_whole_is_refused(world: World, plain: Path, fault: str) -> None:
    """By build and merge, whether it is streamed or not, and by diff unless it is whole in itself."""
    output = Path(tempfile.mkdtemp(dir=world.root)) / "out"
    for base in ("hub", "memory") if fault == "shape" else ("hub",):
        spoilt = world.root / f"spoilt-{base}"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(world.root / base, spoilt)
        spoil(spoilt, fault)
        for large in (True, False):
            world.build(spoilt.name, output, large=large).refused(FAULTS[fault])
            assert not output.exists()
            if base == "hub":
                words = () if fault in ("missing tensor", "shape") else (FAULTS[fault],)
                merged = world.command("merge", plain, "--output", output, "--base", spoilt, large=large)
                merged.refused(*words)
                assert not output.exists()
        if fault not in ("missing tensor", "shape"):
            world.command("diff", world.root / base, spoilt).refused(FAULTS[fault])


@pytest.mark.parametrize("fault", ["truncated", "empty", "header", "gone", "missing tensor", "shape"])
def test_an_artifact_or_an_adapter_that_is_not_whole_is_refused(
    world: World, artifact: Path, adapter: Path, plain: Path, fault: str
) -> None:
    output, spoilt = Path(tempfile.mkdtemp(dir=world.root)) / "out", world.root / "spoilt"
    for source in (artifact, adapter, plain):
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(source, spoilt)
        spoil(spoilt, fault)
        words = {"merge": (spoilt,), "base": (adapter, "--base", spoilt)}["base" if source is artifact else "merge"]
        more = ("--base", world.root / "hub") if source is plain else ()
        for large in (True, False):
            world.command("merge", *words, *more, "--output", output, large=large).refused()
            assert not output.exists()
        if source is not plain:
            with pytest.raises((ArtifactError, AdapterError)):
                solidify.load(*((spoilt,) if source is artifact else (artifact, spoilt)))


@pytest.mark.slow
def test_one_builds_and_another_waits(world: World) -> None:
    """Two builds into one place at once, whatever it is called there; two into different places."""
    output = world.root / "one" / "artifact"
    output.parent.mkdir()
    (world.root / "also-one").symlink_to(output.parent)
    with writing.staged(output) as staging:
        manifest.Manifest("stock", {}).write(staging)  # an earlier result, which may be replaced
        for name in ("one", "also-one"):
            world.build("memory", world.root / name).refused("another process is writing")
        assert world.build("memory", world.root / "two").code == 0
    assert [path.name for path in output.iterdir()] == [manifest.NAME]
    assert [path.name for path in output.parent.iterdir()] == ["artifact"]
    whole(world.root / "two" / "artifact")
    assert world.build("memory", world.root / "also-one").code == 0
    whole(output)


@pytest.mark.slow
def test_the_base_is_on_another_file_system_or_cannot_be_written_to(world: World, artifact: Path) -> None:
    """What cannot be linked is copied; the result is the same."""
    before, base = contents(world.root / "memory"), world.root / "memory"
    reference = manifest.read(artifact).tensors
    read_only = [f"mount --bind {base} {base}", f"mount -o remount,bind,ro {base}"]
    assert world.build("memory", world.root / "from-read-only", mounts=read_only).code == 0
    whole(world.root / "from-read-only" / "artifact")
    assert manifest.read(world.root / "from-read-only" / "artifact").tensors == reference
    assert all(p.stat().st_nlink == 1 for p in (world.root / "from-read-only" / "artifact").glob("*.safetensors"))
    assert contents(base) == before
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        if elsewhere.stat().st_dev == world.root.stat().st_dev:
            pytest.skip("there is no other file system here")
        ended = world.build("memory", elsewhere)
        assert ended.code == 0, ended.err
        whole(elsewhere / "artifact")
        assert manifest.read(elsewhere / "artifact").tensors == reference
        assert contents(base) == before
    finally:
        shutil.rmtree(elsewhere)


def test_the_output_cannot_be_written_to(world: World) -> None:
    (world.root / "file").write_text("")
    (world.root / "closed").mkdir()
    for output in (world.root / "file" / "out", Path("/proc/out")):
        world.build("memory", output).refused("cannot be written to")
    closed = [f"mount --bind {world.root / 'closed'} {world.root / 'closed'}"]
    closed.append(f"mount -o remount,bind,ro {world.root / 'closed'}")
    world.build("memory", world.root / "closed", mounts=closed).refused("cannot be written to: Read-only file system")
    cache = f"import os; os.environ['SOLIDIFY_HOME'] = {str(world.root / 'file')!r}"
    world.build("memory", world.root / "never", before=cache).refused("SOLIDIFY_HOME")
    assert not (world.root / "never").exists()


WRITES = """
from pathlib import Path
from solidify.weights import format
write = format.write_file

def write_file(*arguments):
    path = sorted(Path({base!r}).glob("*.safetensors"))[0]
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    return write(*arguments)

format.write_file = write_file
"""


@pytest.mark.parametrize("base", ["hub", "memory"])
def test_a_base_that_is_written_to_meanwhile_is_noticed(world: World, base: str) -> None:
    restless = world.root / f"restless-{base}"
    shutil.copytree(world.root / base, restless)
    ended = world.build(restless.name, world.root / f"none-{base}", before=WRITES.format(base=str(restless)))
    ended.refused("was written to while it was read", "start again when no other program writes to it")
    assert not (world.root / f"none-{base}").exists()


SLOW = """
import sys
import time

from torch import nn


class Slow(nn.Linear):
    def __init__(self, original):
        super().__init__(original.in_features, original.out_features, bias=False)
        if sys.modules.get("solidify", 0) is None:  # in the process that cannot import it
            time.sleep(20)

    def adopt(self, original):
        self.weight.data.copy_(original.weight)
"""


def witnesses() -> list[int]:
    """Returns the processes that look at artifacts of these tests."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            named = b"witness.py" in (directory / "cmdline").read_bytes()
            ours = os.environ["SOLIDIFY_HOME"].encode() in (directory / "environ").read_bytes()
        except OSError:
            continue
        if named and ours:
            found.append(int(directory.name))
    return found


ASKED = """
import os, signal, threading
from solidify.artifact import certificate
ask = certificate.Alone.ask
def asking(*arguments):
    threading.Timer(7, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return ask(*arguments)
certificate.Alone.ask = asking
"""


@pytest.mark.slow
def test_the_fresh_process_ends_with_the_one_that_started_it(world: World) -> None:
    """Before it is asked, and while it is at work."""
    (world.root / "slow.py").write_text(SLOW)
    recipe = world.root / "slow.yaml"
    recipe.write_text(world.recipe("memory").read_text().replace("wrappers.py:Bottleneck", "slow.py:Slow"))
    recipe.write_text(recipe.read_text().replace("width: 4", ""))
    for options in ({"kill": ("open /orphans/.artifact.partial/.py", 1)}, {"before": ASKED}):
        ended = world.command("build", recipe, "--output", world.root / "orphans", witness=True, **options)
        assert ended.code == -signal.SIGKILL, ended.err
        patience = time.monotonic() + 3
        while witnesses() and time.monotonic() < patience:
            time.sleep(0.1)
        assert witnesses() == []


def test_the_fresh_process_that_nobody_asks_is_quiet() -> None:
    script = Path(solidify.__file__).parent / "artifact" / "witness.py"
    done = subprocess.run([sys.executable, "-P", script], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_a_command_is_killed_at_any_time(world: World) -> None:
    """Not at a chosen point, and with all that belongs to it."""
    output, base = world.root / "any-time", world.root / "memory"
    before = contents(base)
    words = [sys.executable, "-m", "solidify", "build", world.recipe("memory"), "--output", output]
    for seconds in (2, 5, 7, 8, 9, 10, 11, 12, 14):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
        if (output / "artifact").exists():
            whole(output / "artifact")
        assert contents(base) == before
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    whole(output / "artifact")
    assert [path.name for path in output.iterdir()] == ["artifact"]
    assert contents(base) == before
