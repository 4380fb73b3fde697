"""The commands that make files of others: `fastgpt tokenize` and `fastgpt convert`."""

import argparse
from typing import Any

from fastgpt.data import tokenize
from fastgpt.data.tokenizer import encoding
from fastgpt.families.book import VARIANTS
from fastgpt.weights import convert


def add_tokenize(commands: Any) -> None:
    read = commands.add_parser("tokenize", help="make files of tokens from text", allow_abbrev=False)
    read.set_defaults(run=_tokenize)
    read.add_argument(
        "sources", nargs="+", metavar="SRC", help="a text, .jsonl, .parquet or .arrow file, or a folder of them"
    )
    read.add_argument("-o", "--out", required=True, metavar="DIR", help="where train.bin, val.bin and meta.json go")
    read.add_argument("--encoding", default="gpt2", help="byte, gpt2, … (default: gpt2)")
    read.add_argument("--val_share", type=float, default=0.1, metavar="X", help="for validation (default: 0.1)")
    column = "the column of a table, or the field of a .jsonl line, that holds the text (default: text)"
    read.add_argument("--column", "--columns", default="text", metavar="NAME", help=column)
    read.add_argument("--workers", type=int, metavar="N", help="threads (default: one a CPU)")
    read.add_argument("--overwrite", action="store_true", help="replace tokens that are in --out already")


def add_convert(commands: Any) -> None:
    change = commands.add_parser("convert", help="carry weights from one family to another", allow_abbrev=False)
    change.set_defaults(run=_convert)
    change.add_argument("source", metavar="SRC", help="a folder or file of Hugging Face, nanoGPT, the book or fastgpt")
    change.add_argument("target", metavar="DST", help="the folder to write")
    change.add_argument("--to", required=True, choices=("huggingface", "nanogpt", "book", "fastgpt"))
    change.add_argument("--n_head", type=int, metavar="N", help="heads, where nothing in SRC says how many")
    change.add_argument("--vocab_size", type=int, metavar="N", help="crop the vocabulary, or pad it with zeros")
    change.add_argument("--gelu", choices=("tanh", "none"), help="the GELU, where it is not the family's own")
    change.add_argument("--encoding", help="byte, gpt2, … (default: SRC's, or what its vocabulary's size tells)")
    change.add_argument("--variant", choices=VARIANTS, help="for the book (default: GPTModel)")
    change.add_argument("--overwrite", action="store_true", help="write into a folder that holds something")


def _tokenize(options: argparse.Namespace) -> None:
    meta = tokenize(
        options.sources,
        encoding(options.encoding),
        options.out,
        val_share=options.val_share,
        column=options.column,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    print(
        f"{meta['documents']:,} documents, {meta['text_bytes']:,} bytes; in {options.out} are "
        f"{meta['train']['tokens']:,} tokens to train on and {meta['val']['tokens']:,} to validate"
    )


def _convert(options: argparse.Namespace) -> None:
    notes = convert(
        options.source,
        options.target,
        options.to,
        n_head=options.n_head,
        vocab_size=options.vocab_size,
        gelu=options.gelu,
        encoding=options.encoding,
        variant=options.variant,
        overwrite=options.overwrite,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"saved in {options.target}")
