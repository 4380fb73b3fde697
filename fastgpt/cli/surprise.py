"""A page, HTML, that shows a text with each token in a colour for how much it surprised a model."""

import html
import math
from collections.abc import Iterator, Sequence

import tiktoken

from fastgpt.data.tokenizer import END_OF_TEXT, has_end_of_text

MOST = 100_000  # tokens of a page, which a browser still scrolls through
_FULL = 10.0  # nats, at which the colour is deepest

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ font: 15px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
i {{ font-style: normal; border-radius: 2px; }}
{colours}
</style>
<h1>{title}</h1>
<p>{facts}</p>
<p>Nats a token, its surprise: {legend}. Point at a token for its own.</p>
<pre>{text}</pre>
</html>
"""


def page(title: str, facts: str, tokens: Sequence[int], losses: Sequence[float], encoding: tiktoken.Encoding) -> str:
    """tokens (N,), and the loss of each in nats; the first MOST are shown. A character of several tokens is one piece,
    with their losses summed."""
    if len(tokens) > MOST:
        facts += f" The first {MOST:,} tokens are shown."
    steps = range(int(_FULL) + 1)
    pieces = (_piece(text, loss, count) for text, loss, count in _characters(tokens[:MOST], losses[:MOST], encoding))
    return _PAGE.format(
        title=html.escape(title),
        facts=html.escape(facts),
        colours="\n".join(f".s{step} {{ background: rgb(220 50 30 / {0.75 * step / _FULL:.3f}); }}" for step in steps),
        legend=" ".join(f'<i class="s{step}">&nbsp;{step}{"+" if step == _FULL else ""}&nbsp;</i>' for step in steps),
        text="".join(pieces),
    )


def _characters(
    tokens: Sequence[int], losses: Sequence[float], encoding: tiktoken.Encoding
) -> Iterator[tuple[str, float, int]]:
    """Pieces of whole characters: text, the sum of their losses, and the number of tokens."""
    end = encoding.encode_single_token(END_OF_TEXT) if has_end_of_text(encoding) else None
    held, loss, count = b"", 0.0, 0
    for place, (token, own) in enumerate(zip(tokens, losses, strict=True), 1):
        held += b"" if token == end else encoding.decode_single_token_bytes(token)
        loss, count = loss + own, count + 1
        # the longest character has 4 bytes: what is none by then is no text
        if token == end or place == len(tokens) or len(held) > 8 or _is_text(held):
            yield held.decode(errors="replace") + ("¶\n" if token == end else ""), loss, count
            held, loss, count = b"", 0.0, 0


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _piece(text: str, loss: float, count: int) -> str:
    step = min(int(_FULL), round(loss / count))
    said = f"{loss:.2f} nats, probability {math.exp(-loss):.2g}" + (f", {count} tokens" if count > 1 else "")
    return f'<i class="s{step}" title="{said}">{html.escape(text)}</i>'
