"""A launch's programs by turns, one at a time, so that those which wait for each other come to an end."""

import random
import threading
from collections.abc import Callable
from typing import Any


class Stopped(BaseException):
    """Ends a program whose launch has failed elsewhere."""


class Turns:
    """Runs programs as threads of which one at a time goes on. At each atomic operation a turn ends, and one that is
    drawn, perhaps the same, has the next.

    Programs that do nothing but look for what none of them writes are an error: so many looks in a row, that is, as
    none makes that still finds something.
    """

    LOOKS = 1000  # of each program

    def __init__(self, seed: int | None, programs: int, enter: Callable[[int], None], fail: Callable[[str], None]):
        """enter(i): what is to be done before program i goes on. fail(message): raises."""
        self._random, self._enter, self._fail = random.Random(seed or 0), enter, fail
        self._may_go_on = [threading.Semaphore(0) for _ in range(programs)]
        self._alive, self._current, self._looks = list(range(programs)), -1, 0
        self._error: BaseException | None = None

    def run(self, body: Callable[[], Any]) -> None:
        threads = [threading.Thread(target=self._program, args=(i, body), daemon=True) for i in self._alive]
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _program(self, i: int, body: Callable[[], Any]) -> None:
        self._may_go_on[i].acquire()
        try:
            if self._error is None:
                body()
        except Stopped:
            pass
        except BaseException as error:  # told by `run`
            self._error = self._error or error
        self._alive.remove(i)
        if self._alive:
            self._next()

    def _next(self) -> None:
        self._current = self._random.choice(self._alive)
        self._enter(self._current)
        self._may_go_on[self._current].release()

    def over(self, writes: bool) -> None:
        """The running program's turn is over, before an operation that may write."""
        mine = self._current
        self._looks = 0 if writes else self._looks + 1
        if self._looks > self.LOOKS * len(self._may_go_on):
            self._fail(f"{len(self._alive)} programs wait for what none of them writes")
        self._next()
        self._may_go_on[mine].acquire()
        if self._error is not None:
            raise Stopped
