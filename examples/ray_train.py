"""Ray Train starts the workers, fastgpt's own trainer is what each of them runs.

    python examples/ray_train.py text.txt --out trained --steps 100 --workers 2

Ray sets up what torchrun would, so checkpoints, resuming and the global batch are fastgpt's, and `out` must be a folder
that all workers share. Ray's own checkpoints, and its report of metrics, are not used: fastgpt's are in `out`.
"""

import argparse
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

from fastgpt import GPTConfig
from fastgpt.training import TrainConfig, fit


def work(options: dict) -> None:
    config = TrainConfig(
        max_iters=options["steps"], batch_size=4, gradient_accumulation_steps=2, eval_iters=2, sample_tokens=0
    )
    model = GPTConfig.preset("byte-0.1M")
    fit(model, config, "byte", options["text"], options["out"], overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("trained"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true")
    options = parser.parse_args()
    scaling = ray.train.ScalingConfig(num_workers=options.workers, use_gpu=options.gpus)
    told = {"steps": options.steps, "text": str(options.text.resolve()), "out": str(options.out.resolve())}
    TorchTrainer(work, train_loop_config=told, scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
