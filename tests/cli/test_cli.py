import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastgpt
from fastgpt import GPTConfig, cli
from fastgpt.cli import text as cli_text
from fastgpt.training.settings import TrainConfig
from fastgpt.weights import load_model
from tests.cli.commands import TINY, finish, main, start

ROOT = Path(fastgpt.__file__).parents[1]


def test_train_then_generate(text, tmp_path):
    code, out, err = finish(start("train", "--data", text, "--out", str(tmp_path / "out"), *TINY))
    assert (code, err) == (0, "")
    assert "step 3: train 5." in out
    assert f"saved in {tmp_path / 'out'}; a sample:" in out

    process = start("generate", "--checkpoint", str(tmp_path / "out"), "--prompt", "the fox", "--seed", "1")
    code, out, err = finish(process)
    assert code == 0
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, [\d,]+\.\d tokens/s\n", err)
    assert out.startswith("the fox")
    assert len(out) > len("the fox\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --preset byte-0.8m", "unknown preset 'byte-0.8m' (did you mean 'byte-0.8M'?)"),
        ("train --n_heads 4", "fastgpt train: there is no option '--n_heads' (did you mean '--n_head'?)"),
        ("train --learning-rat=1", "there is no option '--learning_rat' (did you mean '--learning_rate'?)"),
        ("train --block_size 0", "block_size is 0, not a whole number of at least 1"),
        ("train --n_head 3", "n_embd = 128 does not divide into n_head = 3 heads"),
        ("train --bias maybe", "argument --bias: 'maybe' is not true or false"),
        ("train --cuda_graph on", "argument --cuda_graph: 'on' is not auto, true or false"),
        ("train --cuda_graph TRUE --device cpu", "cuda_graph is true, and a CUDA graph can't be: the device is cpu"),
        ("train --gelu relu", "argument --gelu: invalid choice: 'relu'"),
        ("train --max_iters many", "argument --max_iters: invalid int value: 'many'"),
        ("train --learning_rate nan", "learning_rate is nan, not a finite number"),
        ("train --vocab_size 256", "vocab_size = 256, the encoding 'byte' has 257 ids"),
        ("train --encoding gtp2", "unknown encoding 'gtp2'"),
        ("train --data gone.txt", "no file or folder gone.txt"),
        ("train --data empty.txt", "empty.txt is empty: 0 bytes"),
        ("train --data short.txt", "short.txt: 27 training tokens are too few for a window of 128 + 1"),
        ("train --data ids.bin --block_size 8", "ids.bin: token 257 at offset 98 is outside the 257 ids"),
        ("train --data text.txt --out short.txt/out", "short.txt/out"),
        ("train --data text.txt --out short.txt", "short.txt"),
        ("train --data text.txt --device abacus", "no device 'abacus' here"),
        ("generate --checkpoint .", "no model.safetensors in .: train a model first"),
        ("generate --temperature warm", "argument --temperature: invalid float value: 'warm'"),
        ("generate --len 4", "fastgpt generate: there is no option '--len' (see fastgpt generate --help)"),
        ("generate hello", "'hello' is one word too many (see fastgpt generate --help)"),
        ("tokenize text.txt -o tokens --val_share 2", "fastgpt tokenize: val_share is 2.0, not between 0 and 1"),
        ("talk", "fastgpt: there is no command 'talk' (see fastgpt --help)"),
        ("trian", "fastgpt: there is no command 'trian' (did you mean 'train'?)"),
        ("train --preset gpt3", "unknown preset 'gpt3'"),
        (
            "train --device mps",
            "no device 'mps' here (MPS is a Mac's GPU, and this PyTorch was built without it)",
        ),
        ("train --tensorboard true --out new/run", "needs `pip install tensorboard`"),
        ("train --data text.txt --backend triton --out new/run", "backend='triton' can't be had"),
        ("tokenize short.txt -o new/tokens --val_share 0.001", "8 tokens are too few to split"),
        ("verify math:sqrt", "fastgpt verify: math:sqrt makes no model: TypeError"),
        (
            "generate --checkpoint text.txt",
            "text.txt is not a file of weights that torch.load reads without running code",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words " * 500)
    (tmp_path / "short.txt").write_text("not enough for one window, no")
    (tmp_path / "empty.txt").write_text("")
    np.array([*range(98), 257, 0], dtype=np.uint16).tofile(tmp_path / "ids.bin")
    before = sorted(os.listdir())
    code, out, err = main(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("fastgpt") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(os.listdir()) == before


def test_a_mistake_in_a_process_of_its_own():
    code, out, err = finish(start("train", "--preset", "byte-1M"))
    assert (code, out) == (2, "")
    assert err.startswith("fastgpt train: unknown preset 'byte-1M' (did you mean ") and err.count("\n") == 1


def test_a_folder_that_holds_a_model_is_kept(capsys, text, checkpoint):
    weights = Path(checkpoint, "model.safetensors").read_bytes()
    code, _, err = main(capsys, "train", "--data", text, "--out", checkpoint, *TINY)
    assert code == 2
    assert "holds a trained model: choose another folder (--out) or --overwrite it" in err
    assert Path(checkpoint, "model.safetensors").read_bytes() == weights


def test_a_model_of_another_encoding(capsys, checkpoint, tmp_path):
    for file in (Path(checkpoint, name) for name in ("model.safetensors", "config.json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoding": "gpt2"}))
    code, _, err = main(capsys, "generate", "--checkpoint", str(tmp_path))
    assert code == 2
    assert "the encoding 'gpt2' has 50257 ids, the model 257" in err


@pytest.fixture
def fitted(monkeypatch):
    """The plan and the rest that `train` gets; nothing is trained and no sample written."""
    got = []
    monkeypatch.setattr("fastgpt.training.train", lambda *arguments: got.extend(arguments))
    monkeypatch.setattr(cli_text, "write", lambda *arguments, **options: None)
    return got


def test_options_reach_both_configurations(capsys, fitted):
    options = (
        "--preset byte-10M --n_layer 3 --n_inner 24 --bias false --gelu none --dropout 0.1 --max_iters 7 --beta1 0.5"
    )
    code, _, _ = main(capsys, "train", "--data", "a", "--out", "b", "--overwrite", *options.split())
    assert code == 0
    plan, *rest = fitted
    assert plan.model == GPTConfig.preset("byte-10M", n_layer=3, n_inner=24, bias=False, gelu="none", dropout=0.1)
    assert plan.config == TrainConfig(max_iters=7, beta1=0.5)
    assert (plan.source, plan.out, plan.resume, *rest) == ("a", Path("b"), False, True, False)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [("", "byte"), ("--preset gpt2-124M", "gpt2"), ("--preset gpt2-124M --encoding byte", "byte")],
)
def test_the_encoding_is_the_presets(capsys, fitted, arguments, name):
    assert main(capsys, "train", *arguments.split())[0] == 0
    assert fitted[0].encoding.name == name
    assert fitted[0].source is None, "no --data is the built-in corpus"


@pytest.mark.skipif(os.name == "nt", reason="a process can't be sent Ctrl-C on Windows")
def test_ctrl_c_in_training_leaves_a_model(text, tmp_path):
    endless = [*TINY, "--max_iters=1000000", "--eval_interval=50"]
    process = start("train", "--data", text, "--out", str(tmp_path), *endless)
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"step 50:") for line in lines)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    steps = int(out.partition("interrupted after ")[2].split()[0])
    model, config = load_model(tmp_path)
    assert config["step"] == steps >= 50
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_reader_that_goes_away(checkpoint):
    """As in `fastgpt generate | head -c 5`."""
    process = start("generate", "--checkpoint", checkpoint, "--prompt", "the fox", "--max_new_tokens", "1000000")
    assert process.stdout.read(5) == b"the f"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 0


def test_no_memory_is_one_line(monkeypatch, capsys):
    """PyTorch has no class of its own for it on a CPU; any other RuntimeError is a bug, and shows as one."""
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore")):
        monkeypatch.setattr("fastgpt.training.train", lambda *args, error=error: (_ for _ in ()).throw(error))
        assert cli.main(["train", "--preset", "byte-0.1M"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "memory" in said
    monkeypatch.setattr("fastgpt.training.train", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "--preset", "byte-0.1M"])


@pytest.mark.parametrize(("command", "code"), [("train", 141), ("eval", 0)])
def test_a_reader_that_went_away_leaves_a_run_unfinished(command, code, monkeypatch):
    def gone(options):
        raise BrokenPipeError

    monkeypatch.setattr("fastgpt.cli.train.run", gone)
    monkeypatch.setattr(cli_text, "_evaluate", gone)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert cli.main([command, *(["--checkpoint", "x", "y"] if command == "eval" else [])]) == code


def test_nothing_said_is_the_help(capsys):
    code, out, err = main(capsys)
    assert (code, err) == (0, "") and out.startswith("usage: fastgpt") and "train | tokenize" in out


def test_version(capsys):
    assert main(capsys, "--version") == (0, f"fastgpt {fastgpt.__version__}\n", "")


def test_the_help_of_train_says_what_each_option_is(capsys, monkeypatch):
    """And its own default: the shape is the preset's, which GPTConfig's defaults are not."""
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = main(capsys, "train", "--help")
    listed = " ".join(out[out.index("options:") :].split())
    for config in (GPTConfig, TrainConfig):
        for name in config.__dataclass_fields__:
            assert re.search(rf"--{name} [A-Z{{]\S* [\w',]+ ", listed), name
    assert code == 0 and "blocks (default: the preset's)" in out and "steps (default: 1400)" in out
    assert "default: None" not in out and "default: 12" not in out


def test_a_checkpoints_folder_is_a_model(capsys, checkpoint):
    (step,) = Path(checkpoint, "checkpoints").glob("step-*")
    how = ("--prompt", "the fox", "--temperature", "0", "--max_new_tokens", "9")
    whole = main(capsys, "generate", "--checkpoint", checkpoint, *how)[:2]
    assert main(capsys, "generate", "--checkpoint", str(step), *how)[:2] == whole
    assert whole[0] == 0


def test_heads_that_are_not_the_models_are_refused(capsys, checkpoint):
    code, _, err = main(capsys, "generate", "--checkpoint", checkpoint, "--n_head", "4")
    assert code == 2 and "n_head is 4" in err and "has 2 heads" in err


def test_what_to_do_next_is_told_and_works(capsys, text, tmp_path):
    out = tmp_path / "a run"
    last = main(capsys, "train", "--data", text, "--out", str(out), *TINY)[1].splitlines()[-2:]
    for line in last:
        assert main(capsys, *shlex.split(line[line.index("fastgpt ") :])[1:])[0] == 0
    assert load_model(out)[1]["step"] == 6


def test_samples_of_the_built_in_corpus_begin_with_def(fitted, capsys):
    assert main(capsys, "train")[0] == 0
    assert fitted[0].config.sample_prompt == "def "
    fitted.clear()
    assert main(capsys, "train", "--sample_prompt", "class ")[0] == 0
    assert fitted[0].config.sample_prompt == "class "


def test_a_run_among_its_texts_is_none_of_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    assert main(capsys, "train", "--data", ".", "--out", "out", *TINY)[0] == 0
    code, out, err = main(capsys, "train", "--out", "out", "--resume", "--max_iters", "4")
    assert code == 0 and "resuming from" in out, err
    code, _, err = main(capsys, "train", "--data", ".", "--out", "../" + tmp_path.name, *TINY)
    assert code == 2 and "holds the texts, and the run's files would lie among them: choose another --out" in err
    assert sorted(os.listdir()) == ["fox.txt", "out"]


def test_a_refused_run_leaves_nothing_in_a_folder_that_was_there(capsys, text, tmp_path):
    code, _, err = main(capsys, "train", "--data", text, "--out", str(tmp_path), *TINY, "--backend", "triton")
    assert code == 2 and "backend='triton' can't be had" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is UTF-8")
def test_a_folder_whose_name_is_not_utf8(capfd, text, tmp_path, monkeypatch):
    """Trained in, resumed, written from and converted; what to do next is told as a shell reads it."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"it's caf\xe9")
    assert main(capfd, "train", "--data", text, "--out", name, *TINY)[0] == 0
    last = main(capfd, "train", "--out", name, "--resume", "--max_iters", "3")[1].splitlines()[-2:]
    for line in last:
        read = subprocess.run(["bash", "-c", f"printf '%s\\0' {line[line.index('fastgpt ') :]}"], capture_output=True)
        assert main(capfd, *map(os.fsdecode, read.stdout.split(b"\0")[1:-1]))[0] == 0
    assert load_model(name)[1]["step"] == 6
    assert main(capfd, "convert", name, f"{name}2", "--to", "huggingface")[0] == 0
    assert main(capfd, "eval", text, "--checkpoint", f"{name}2", "--encoding", "byte")[0] == 0
