"""Training: a GPT from a corpus, on one device or many, that can be stopped anywhere and goes on to the bit. Public are
fit, TrainConfig, plan_run and train, which fit is made of, and TrainingStep and adamw for loops of one's own."""

from fastgpt.training.fitting import fit, train
from fastgpt.training.optimizer import TrainingStep, adamw
from fastgpt.training.plan import Plan, plan_run, pretrained
from fastgpt.training.run import CHECKPOINTS
from fastgpt.training.settings import TrainConfig

__all__ = [
    "CHECKPOINTS",
    "Plan",
    "TrainConfig",
    "TrainingStep",
    "adamw",
    "fit",
    "plan_run",
    "pretrained",
    "train",
]
