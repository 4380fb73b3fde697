"""Where a run's numbers go beside the files of its folder: TensorBoard's events, and Weights & Biases."""

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from fastgpt.model import GPTConfig

EVENTS, WANDB_ID = "tensorboard", "wandb.id"


class Tracker(Protocol):
    """ValueError on creation where what it needs is not installed."""

    name: str

    def open(self, folder: Path, config: GPTConfig) -> None: ...
    def log(self, scalars: dict[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def trackers(tensorboard: bool, wandb: bool) -> list[Tracker]:
    found: list[Tracker] = [TensorBoard()] if tensorboard else []
    return [*found, WeightsAndBiases()] if wandb else found


class TensorBoard:
    name = "TensorBoard"

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard true needs `pip install tensorboard`") from error
        self._writer: Any = SummaryWriter
        self._events: Any = None

    def open(self, folder: Path, config: GPTConfig) -> None:
        self._events = self._writer(str(folder / EVENTS))

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A resumed run goes on as the same run there: its id is kept in the folder. WANDB_PROJECT, WANDB_MODE=offline and
    all else that wandb reads from the environment are the user's."""

    name = "Weights & Biases"

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb true needs `pip install wandb`") from error
        self._wandb: Any = wandb
        self._run: Any = None

    def open(self, folder: Path, config: GPTConfig) -> None:
        file = folder / WANDB_ID
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgpt"),
            name=folder.resolve().name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()
