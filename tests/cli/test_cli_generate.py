"""What `fastgpt generate` gives to stream, and writes of what that yields."""

import io
import sys

import pytest

from fastgpt import cli
from fastgpt.cli import text as cli_text
from fastgpt.data.tokenizer import END_OF_TEXT
from fastgpt.generation import Step, _Row, _Stops
from tests.cli.commands import main


@pytest.fixture
def told(monkeypatch):
    """Makes `stream` yield these ids as text; the arguments that it got are in `told.arguments`."""

    def told(ids):
        def stream(decoder, prompt, count, **options):
            told.arguments = dict(prompt=prompt, count=count, **options)
            row = _Row(prompt[0], len(ids), _Stops(frozenset([options["stop_ids"]]), [], options["encoding"]))
            return (
                Step([kept], [text], None, [row.reason]) for kept, text in map(row.take, ([token] for token in ids))
            )

        monkeypatch.setattr(cli_text, "stream", stream)

    return told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max_new_tokens 0", "max_new_tokens is 0, not at least 1"),
        ("--temperature -1", "temperature is -1.0, not a finite number of at least 0"),
        ("--top_k 0", "top_k is 0, not at least 1"),
        ("--seed 99999999999999999999", "seed is 99999999999999999999, not a 64-bit integer"),
    ],
)
def test_a_bad_number_for_generate(capsys, checkpoint, arguments, message):
    code, _, err = main(capsys, "generate", "--checkpoint", checkpoint, *arguments.split())
    assert code == 2
    assert err == f"fastgpt generate: {message}\n"


def test_generate_is_repeatable_with_a_seed(capsys, checkpoint):
    command = ["generate", "--checkpoint", checkpoint, "--max_new_tokens", "30", "--seed"]
    first, again, other = (main(capsys, *command, seed)[1] for seed in ("7", "7", "8"))
    assert first == again != other


def test_the_prompt_may_pass_the_context(capsys, checkpoint):
    code, out, _ = main(
        capsys, "generate", "--checkpoint", checkpoint, "--prompt", "x" * 99, "--max_new_tokens", "30", "--seed", "7"
    )
    assert code == 0
    assert out.startswith("x" * 99)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("", [256]), ("fox", [*b"fox"]), (END_OF_TEXT, [*END_OF_TEXT.encode()]), ("é🙂", [*"é🙂".encode()])],
    ids=["empty", "text", "special", "multi-byte"],
)
def test_the_prompt_is_text(capsys, checkpoint, told, prompt, ids):
    told(b"!")
    assert main(capsys, "generate", "--checkpoint", checkpoint, "--prompt", prompt)[:2] == (0, f"{prompt}!\n")
    assert told.arguments["prompt"] == [ids]


def test_options_reach_generate(capsys, checkpoint, told):
    told(b"")
    options = "--max_new_tokens 9 --temperature 0.5 --top_k 3 --seed 4 --top_p 0.75 --min_p 0.1 --stop a"
    options = [*options.split(), "--repetition_penalty", "1.5", "--stop", "b c", "--overflow", "error"]
    assert main(capsys, "generate", "--checkpoint", checkpoint, *options)[0] == 0
    expected = dict(count=9, temperature=0.5, top_k=3, top_p=0.75, min_p=0.1, repetition_penalty=1.5, seed=4)
    expected |= dict(stop_strings=["a", "b c"], stop_ids=256, overflow="error", num_samples=1)
    assert {name: told.arguments[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "asks"),
    [([], True), (["--prompt", "fox"], False), (["--prompt_file", "FILE"], False), (["--json"], False)],
    ids=["none", "prompt", "file", "json"],
)
@pytest.mark.parametrize("terminals", [(True, True), (True, False), (False, True)])
def test_a_prompt_is_asked_for_where_none_is_given_and_a_person_sits(
    capsys, checkpoint, told, monkeypatch, tmp_path, options, asks, terminals
):
    told(b"!")
    (tmp_path / "prompt.txt").write_text("fox")
    monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
    for stream, terminal in zip((sys.stdin, sys.stdout), terminals, strict=True):
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
    options = [str(tmp_path / "prompt.txt") if each == "FILE" else each for each in options]
    code, out, _ = main(capsys, "generate", "--checkpoint", checkpoint, "--max_new_tokens", "1", *options)
    assert code == 0 and ("prompt> " in out) == (asks and all(terminals))


def test_text_ends_with_the_document(capsys, checkpoint, told):
    told([*b"end", 256, *b"of another"])
    assert main(capsys, "generate", "--checkpoint", checkpoint)[1] == "end\n"


def test_characters_are_streamed_whole(monkeypatch, checkpoint, told):
    class Terminal(io.StringIO):
        """What it showed at each flush."""

        def flush(self):
            shown.append(self.getvalue())

    shown = []
    told([*"aé🙂z".encode(), 0xC3])
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["generate", "--checkpoint", checkpoint, "--prompt", "> "]) == 0
    whole = ["> ", "> a", "> aé", "> aé🙂", "> aé🙂z"]
    assert list(dict.fromkeys(shown)) == [
        *whole,
        "> aé🙂z\ufffd",
        "> aé🙂z\ufffd\n",
    ]  # it stopped in a character's middle


def test_ctrl_c_in_generate(capsys, checkpoint, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_text, "stream", interrupted)
    assert main(capsys, "generate", "--checkpoint", checkpoint) == (130, "", "")
