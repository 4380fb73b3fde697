"""fastgpt: Triton kernels, blocks and a trainer that make GPT-2-class models fast on NVIDIA GPUs."""

from pathlib import Path

# Installed, the kernels lie inside this package; in a checkout they lie beside it, under a name that belongs to
# Hugging Face's `kernels`. Only then does the checkout's root join the search path, so `fastgpt.kernels` is ours.
_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "layernorm.py").is_file():
    __path__.append(str(_HERE.parent))

from fastgpt.generation import generate, stream  # noqa: E402
from fastgpt.model import GPT, GPTConfig  # noqa: E402 (the search path comes first)
from fastgpt.ops import explain  # noqa: E402
from fastgpt.swap import Report, accelerate, accelerated, restore  # noqa: E402

__all__ = ["GPT", "GPTConfig", "Report", "accelerate", "accelerated", "explain", "generate", "restore", "stream"]
__version__ = "0.2.0"
