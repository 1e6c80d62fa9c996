"""Turns: threads compute one at a time, each for a token, in the order in which they asked."""

import threading
from collections import deque


class Turns:
    """A lock that is handed on in the order of asking, where threading.Lock may go to the same thread again and again.

    Threads that compute at the same time are slower than one after the other: Python runs one of them at a time, and
    torch's threads of all of them fight for the cores.

        with turns:
            for token in ...:
                turns.hand_on()
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken = False
        self.queue: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self.lock:
            if not self.taken:
                self.taken = True
                return
            called = threading.Lock()
            called.acquire()
            self.queue.append(called)
        called.acquire()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.queue:
                self.queue.popleft().release()  # the turn stays taken, by another
            else:
                self.taken = False

    def hand_on(self) -> None:
        """Let those compute who have asked by now, each for a turn, and go on behind them."""
        if self.queue:
            self.__exit__()
            self.__enter__()


turns = Turns()  # of this process, whose cores and interpreter all its models share
