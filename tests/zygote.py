"""A process that has imported what takes seconds, and forks those that tests start: only their imports are shared.

What it forks has its own arguments, folder, environment, streams, session, signals and exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

AVAILABLE = hasattr(os, "fork")


class Process:
    """A process of the zygote's, with what the tests use of `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int, stdout: Any, stderr: Any) -> None:
        self._zygote, self.pid, self.stdout, self.stderr = zygote, pid, stdout, stderr

    @property
    def returncode(self) -> int | None:
        return self._zygote.codes.get(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._zygote.changed:
            if not self._zygote.changed.wait_for(lambda: self.pid in self._zygote.codes, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._zygote.codes[self.pid]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        texts = {}

        def read(name: str, stream: Any) -> None:
            texts[name] = stream.read()
            stream.close()

        streams = {name: getattr(self, name) for name in ("stdout", "stderr")}
        readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams.items() if pair[1]]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts.get("stdout", ""), texts.get("stderr", "")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


class Zygote:
    """The zygote, as the tests see it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.codes: dict[int, int] = {}
        self.changed = threading.Condition()
        self._started: list[int] = []
        self._socket, theirs = socket.socketpair()
        with theirs:
            # It has a session of its own: Ctrl-C on pytest's terminal is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())],
                **{"env": environment, "pass_fds": [theirs.fileno()], "stdin": subprocess.DEVNULL},
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(timeout=60)

    def _listen(self) -> None:
        with self._socket.makefile("r") as lines:
            for line in lines:
                pid, code = json.loads(line)
                with self.changed:
                    if code is None:
                        self._started.append(pid)
                    else:
                        self.codes[pid] = code
                    self.changed.notify_all()

    def start(
        self,
        command: tuple[str, ...],
        cwd: Path | None,
        environment: dict[str, str],
        stdout: int,
        stderr: int,
        start_new_session: bool = False,
    ) -> Process:
        ends: list[Any] = []
        with contextlib.ExitStack() as stack:
            theirs = [os.open(os.devnull, os.O_RDONLY)]
            stack.callback(os.close, theirs[0])
            for where in (stdout, stderr):
                if where == subprocess.PIPE:
                    ours, other = os.pipe()
                    stack.callback(os.close, other)
                    ends.append(os.fdopen(ours, encoding="utf-8", errors="surrogateescape"))
                    theirs.append(other)
                else:
                    ends.append(None)
                    theirs.append(theirs[1] if where == subprocess.STDOUT else where)
            request = [command, str(cwd or Path.cwd()), environment, start_new_session]
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], theirs)
            with self.changed:
                if not self.changed.wait_for(lambda: self._started, 120):
                    raise TimeoutError("the zygote does not start anything")
                return Process(self, self._started.pop(), *ends)


@functools.cache
def shared(environment: tuple[tuple[str, str], ...]) -> Zygote:
    """The one of this process."""
    return Zygote(dict(environment))


def takes(command: tuple[str, ...]) -> bool:
    """Whether the zygote runs such a command: one of the package's command lines, or a script."""
    words = command[1:] if command[:1] == ("-u",) else command
    return words[:2] == ("-m", "torchreid_snloss") or words[0].endswith(".py")


def serve(channel: socket.socket) -> list[Any] | None:
    """Forks; returns None when the tests have ended, and in what it has forked, what that is to run."""
    wakes, woken = os.pipe()
    for end in (wakes, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    alive: set[int] = set()
    while True:
        ready, _, _ = select.select([channel, wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                alive.discard(ended[0])
                channel.sendall(json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]).encode() + b"\n")
        if channel not in ready:
            continue
        text, streams, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        while text and not text.endswith(b"\n"):
            text += channel.recv(1 << 20)
        if not text:  # pytest has ended, or was killed: what a test left behind ends too
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (wakes, woken):
                os.close(end)
            channel.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            request: list[Any] = json.loads(text)
            return request
        for stream in streams:
            os.close(stream)
        alive.add(pid)
        channel.sendall(json.dumps([pid, None]).encode() + b"\n")


def become(command: list[str], cwd: str, environment: dict[str, str], start_new_session: bool) -> None:
    """Runs what Python would run with these arguments, in a new process."""
    if start_new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.__stdout__ = sys.stdout
    words = command[1:] if command[0] == "-u" else command
    if words[0] == "-m":
        sys.path[0], sys.argv = cwd, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = cwd, ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path[0], sys.argv = str(Path(words[0]).parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import torchreid_snloss.cli  # noqa: F401

    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        asked = serve(inherited)
    if asked is not None:
        become(*asked)
