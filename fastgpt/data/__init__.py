"""Tokens to train on: corpora, files of tokens, which windows a step sees, and the tokenizer. Public are the names
below, and encoding in tokenizer.py."""

from fastgpt.data.corpora import Corpus, builtin_documents, holds_tokens, load_corpus, read_tokens
from fastgpt.data.tokenization import tokenize
from fastgpt.data.windows import Order, documents, windows

__all__ = [
    "Corpus",
    "Order",
    "builtin_documents",
    "documents",
    "holds_tokens",
    "load_corpus",
    "read_tokens",
    "tokenize",
    "windows",
]
