"""Fresh processes that need not import torch: forks of one process that has imported it and has done nothing else.

Of the four seconds that a fresh process of solidify takes, three go into what transformers imports before it is itself
imported, the same each time. Here one process imports that, and nothing of transformers, PEFT or solidify; whoever asks
for a fresh process gets a fork of it that runs the script from its first line, with an environment, a directory,
arguments and standard streams of its own. `make test-all` starts every process anew; a command that a test gives always
does.

With the path of a socket, what PYTHONPATH was, a script and its arguments this file is the one who asks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What `from transformers import PreTrainedModel` imports of others and takes long. None of it reads the environment
# that solidify sets for a fresh process (HF_MODULES_CACHE, HF_HUB_OFFLINE).
IMPORTED = ("torch", "torch.distributed.tensor", "torch._dynamo", "torch.export", "scipy.optimize", "safetensors.torch")
_LONG = 2**20


@contextmanager
def started(directory: Path) -> Iterator[list[str]]:
    """Starts the process; yields what stands in the place of `python` before a script.

    It ends with the one that started it.
    """
    import subprocess

    address = directory / "socket"
    process = subprocess.Popen([sys.executable, "-P", __file__, "serve", str(address)], stdin=subprocess.PIPE)
    try:
        yield [sys.executable, "-I", "-S", __file__, str(address), os.environ.get("PYTHONPATH", "")]
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def ask(address: str, path: str, words: list[str]) -> int:
    """Has a fork run a script with our streams, environment and directory; returns its exit code."""
    import time

    if os.environ.get("PYTHONPATH", "") != path:
        os.execv(sys.executable, [sys.executable, "-P", *words])
    with socket.socket(socket.AF_UNIX) as connection:
        for _ in range(600):
            with suppress(FileNotFoundError, ConnectionRefusedError):
                connection.connect(address)
                break
            time.sleep(0.1)
        request = json.dumps({"words": words, "environment": dict(os.environ), "directory": os.getcwd()}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(4)
    if not answer:  # it was killed
        os.kill(os.getpid(), signal.SIGKILL)
    return int.from_bytes(answer, "big")


def serve(address: str) -> None:
    """Answers until the standard input ends."""
    import gc
    import selectors
    from importlib import import_module

    gc.disable()
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ready = selectors.DefaultSelector()
    ready.register(0, selectors.EVENT_READ)
    ready.register(listener, selectors.EVENT_READ)
    while not any(key.fileobj == 0 for key, _ in ready.select()):
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        ready.close()
        listener.close()
        os._exit(_run(connection))


def _run(connection: socket.socket) -> int:
    import runpy
    import traceback

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(head, "big"), []
    while left:
        parts.append(connection.recv(min(left, _LONG)))
        left -= len(parts[-1])
    request = json.loads(b"".join(parts))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        connection.sendall(code.to_bytes(4, "big"))
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2], sys.argv[3:]))
