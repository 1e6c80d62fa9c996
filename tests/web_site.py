"""The web page as a process of its own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from serving import ROOT, wait_for

# The program itself, in a process that writes down every address that it looks up or connects to.
WATCHED = """
import sys
log = open(sys.argv.pop(1), "a", buffering=1)
def note(event, arguments):
    if event == "socket.connect" or event == "socket.getaddrinfo":
        print(arguments[1] if event == "socket.connect" else arguments[0], file=log)
sys.addaudithook(note)
import mini_qwen_web
mini_qwen_web.main()
"""


class Site:
    """`mini_qwen_web.py` as a process of its own."""

    def __init__(self, folder: Path, models: list[str], *arguments: str, **variables: str) -> None:
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log, self.called, self.votes = folder / "log", folder / "called", folder / "votes.jsonl"
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", WATCHED, str(self.called), *models, "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--votes", str(self.votes), *arguments],
                cwd=folder.parent,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def ready(self) -> "Site":
        def look() -> bool:
            assert self.process.poll() is None, self.said
            return "the page: " in self.said

        wait_for(look, 120)
        return self

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
