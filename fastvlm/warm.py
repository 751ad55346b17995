"""A Python process with the libraries imported, from which commands fork to save the seconds of importing torch.

It starts the cells of a sweep and the tests' command lines. A command runs as a user would run it: the script as
`__main__`, in its own process, session, folder and environment, with every module of this project imported again; only
third-party modules are shared. Signals, exit status and output are the process's own.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Modules that are slow to import and that runs need.
LIBRARIES = ["hydra", "omegaconf", "torch", "torch._dynamo", "torch.distributed", "torch.utils.data", "torchvision"]
LIBRARIES += ["einops", "jaxtyping", "lightning", "torchmetrics", "mlflow", "mlflow.tracking", "sqlalchemy", "alembic"]
LIBRARIES += ["rich.progress", "tokenizers", "transformers", "transformers.models.llama.modeling_llama", "peft"]
LIBRARIES += ["transformers.models.auto.modeling_auto", "safetensors.torch", "webdataset", "PIL.Image", "scipy.stats"]
LIBRARIES += ["pandas", "matplotlib.pyplot", "sklearn.datasets"]

Command = list[str]


class WarmProcess:
    """A started command, with pid, poll, wait, send_signal and returncode as in `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, command: Command):
        self.args, self.returncode = command, None
        self._connection, self._said = connection, connection.makefile("r")
        self.pid = int(self._said.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, or minus the number of the signal that ended it.

        It is -9, too, if the process that it was forked from was killed: nobody then knows its own.

        Raises:
            subprocess.TimeoutExpired: the command is still running after `timeout` seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._said.readline() or -signal.SIGKILL)
            except TimeoutError:
                self._said = self._connection.makefile("r")  # the old one is unusable after a timeout
                raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        # Without `poll`, which would wait for as long as another thread is in `wait`.
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class WarmPython:
    """Starts commands in forks of one process: `["train.py", ...]`, `["-m", "module", ...]`, `["-c", "code", ...]`.

    A command's own `OMP_NUM_THREADS` takes effect only through `hardware.threads`, because OpenMP read the variable
    before the fork.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._address, self._log = (Path(self._folder.name) / name for name in ("socket", "log"))
        # -P keeps this file's folder off sys.path.
        command = [sys.executable, "-P", __file__, str(self._address), str(os.getpid())]
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def start(
        self, command: Command, *, env: dict[str, str] | None = None, cwd: str | Path = ".", stdout=1, stderr=2
    ) -> WarmProcess:
        """Run `command`; `stdout` and `stderr` are file descriptors or open files."""
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(self._address))
                break
            except (FileNotFoundError, ConnectionRefusedError):  # still importing
                if self._server.poll() is not None:
                    raise RuntimeError(f"no process to fork from: {self._log.read_text()}") from None
                time.sleep(0.05)
        request = {"command": command, "env": dict(os.environ if env is None else env), "cwd": os.path.abspath(cwd)}
        body = json.dumps(request).encode()
        files = [file if isinstance(file, int) else file.fileno() for file in (stdout, stderr)]
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], files)
        connection.sendall(body)
        return WarmProcess(connection, [sys.executable, *command])

    def close(self) -> None:
        """End the process that commands fork from; running commands continue."""
        self._server.kill()
        self._server.wait()
        self._folder.cleanup()


def serve(address: str, parent: int) -> dict:
    """Fork for each request and send back its pid, then its exit status; return the request, in the fork only."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    while os.getppid() == parent:
        for key, _ in events.select(timeout=5):
            if key.fileobj is not listener:  # a fork has ended
                pid, connection = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                events.unregister(key.fileobj)
                os.close(key.fileobj)
                with connection, contextlib.suppress(BrokenPipeError):  # the client is gone
                    connection.sendall(f"{code}\n".encode())
                continue
            connection, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(connection, 4, 2)
            with connection.makefile("rb") as lines:
                request = json.loads(lines.read(int.from_bytes(size, "big")))
            pid = os.fork()
            if pid == 0:
                os.setsid()
                for number, file in enumerate(files, start=1):
                    os.dup2(file, number)
                    os.close(file)
                connection.close(), listener.close(), events.close()
                for stream in (sys.stdout, sys.stderr):
                    stream.reconfigure(line_buffering=stream.isatty() or stream is sys.stderr)
                return request
            for file in files:
                os.close(file)
            connection.sendall(f"{pid}\n".encode())
            events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
    os._exit(0)


def run_as_main(command: Command, env: dict[str, str], cwd: str) -> None:
    """Run a script, `-m module` or `-c code` as the Python interpreter would."""
    import runpy

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.orig_argv = [sys.executable, *command]  # used to start further ranks
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if command[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        script = os.path.abspath(command[0])
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *command[1:]]
        runpy.run_path(script, run_name="__main__")


def end_process(error: BaseException | None) -> None:
    """Exit as the interpreter would, but without tearing down the libraries, which takes seconds."""
    import atexit
    import threading

    code = 1
    if error is None or (isinstance(error, SystemExit) and error.code is None):
        code = 0
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    elif isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    elif isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import gc
    import importlib

    # A fork that is interrupted at once waits until it is the command: Python's own hooks after a fork would lose it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # otherwise the first collection in every fork would copy the pages of all libraries
    request, error = serve(sys.argv[1], int(sys.argv[2])), None
    try:
        run_as_main(**request)
    except BaseException as raised:
        error = raised
    end_process(error)
