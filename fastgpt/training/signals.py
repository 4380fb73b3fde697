"""Ctrl-C and SIGTERM: the first lets the step end, the second ends the process."""

import os
import signal
import threading
from typing import Any


class Signals:
    """Inside, the first Ctrl-C or SIGTERM is noted in `got`, for the loop to act on; the second ends the process."""

    def __init__(self):
        self.got = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # only there can Python set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.got:
            os._exit(128 + number)
        self.got = number
