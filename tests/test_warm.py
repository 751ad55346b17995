"""Commands forked from a warm process: signals reach them, and their end is known even if that process is killed."""

import signal
import socket
import subprocess
import threading
import time

from fastvlm.warm import WarmProcess


def test_a_signal_does_not_wait_for_a_thread_that_waits_for_the_same_process():
    ours, servers = socket.socketpair()
    sleeper = subprocess.Popen(["sleep", "60"])
    servers.sendall(f"{sleeper.pid}\n".encode())
    process = WarmProcess(ours, ["sleep", "60"])
    waiting = threading.Thread(target=process.wait, daemon=True)
    waiting.start()
    time.sleep(0.2)  # until it reads
    threading.Thread(target=process.send_signal, args=(signal.SIGTERM,), daemon=True).start()
    assert sleeper.wait(10) == -signal.SIGTERM
    servers.sendall(b"-15\n")
    waiting.join(10)
    process.send_signal(signal.SIGTERM)  # to nobody
    assert process.returncode == -signal.SIGTERM


def test_a_process_whose_server_was_killed_counts_as_killed():
    ours, servers = socket.socketpair()
    servers.sendall(b"123\n")
    process = WarmProcess(ours, ["train.py"])
    servers.close()
    assert process.wait() == -signal.SIGKILL
