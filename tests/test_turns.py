"""mini_qwen/turns.py: one thread at a time, each in its turn."""

import threading
from collections.abc import Callable

import pytest
from serving import wait_for

from mini_qwen.turns import Turns

DEADLINE = 30.0  # seconds


def run(*work: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    return threads


def test_each_in_its_turn() -> None:
    """Those who asked while another computed come in the order of asking, again and again."""
    turns, order = Turns(), []

    def worker(name: str) -> Callable[[], None]:
        def work() -> None:
            with turns:
                for _ in range(3):
                    order.append(name)
                    turns.hand_on()

        return work

    threads: list[threading.Thread] = []
    with turns:
        for number, name in enumerate("abc"):
            threads += run(worker(name))
            wait_for(lambda due=number + 1: len(turns.queue) == due, DEADLINE)
    for thread in threads:
        thread.join(DEADLINE)
    assert "".join(order) == "abcabcabc"


def test_never_two_at_once() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        for _ in range(50):
            with turns:
                for _ in range(4):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    threading.Event().wait(0.0001)  # others would come in here
                    inside[0] -= 1
                    turns.hand_on()

    for thread in run(*[work] * 4):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert most == [1]
    assert not turns.taken and not turns.queue


def test_who_fails_leaves_the_turn_to_others() -> None:
    turns = Turns()
    with pytest.raises(ValueError), turns:
        raise ValueError
    with turns:  # would wait for ever
        turns.hand_on()
    assert not turns.taken
