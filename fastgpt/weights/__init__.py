"""A GPT's weights on the disk: from_pretrained, load_model and load_named read them, save_pretrained, save_model and
convert write them, and all but files.py's rules for strangers' files is public here.

fastgpt's own folder has model.safetensors with the weights and config.json with the model's shape and encoding.
"""

from fastgpt.weights.files import CONFIG, WEIGHTS
from fastgpt.weights.pretrained import HUB, from_pretrained, load_model, load_named
from fastgpt.weights.saving import convert, save_model, save_pretrained, stream_model, stream_pretrained

__all__ = [
    "CONFIG",
    "HUB",
    "WEIGHTS",
    "convert",
    "from_pretrained",
    "load_model",
    "load_named",
    "save_model",
    "save_pretrained",
    "stream_model",
    "stream_pretrained",
]
