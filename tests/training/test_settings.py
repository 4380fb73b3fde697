"""TrainConfig's rules, the schedules, and the settings file."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from fastgpt import GPTConfig, cli
from fastgpt.training import plan_run
from fastgpt.training.settings import TrainConfig, read_settings, settings_text
from fastgpt.weights import load_model

RATES = dict(learning_rate=1.0, min_lr=0.2, max_iters=101, warmup_iters=10)


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        (dict(schedule="wsd", decay_share=0.2), {0: 0.1, 10: 1.0, 79: 1.0, 90: 1 - 0.8 * 11 / 21, 100: 0.2, 150: 0.2}),
        (dict(schedule="wsd", decay_share=1.0), {10: 1.0, 55: 0.6, 100: 0.2}),
        (dict(decay_lr=False), {0: 0.1, 10: 1.0, 100: 1.0}),
        (dict(lr_decay_iters=61), {10: 1.0, 35: 0.6, 60: 0.2, 100: 0.2}),
    ],
    ids=["wsd", "all decay", "constant", "decay ends early"],
)
def test_schedules(fields, rates):
    config = TrainConfig(**RATES, **fields)
    assert {step: config.learning_rate_at(step) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(total_batch_size=0), "total_batch_size is 0, not at least 1"),
        (dict(checkpoint_interval=0), "checkpoint_interval is 0, not at least 1"),
        (dict(decay_share=0.0), r"decay_share is 0.0, not in \(0, 1\]"),
        (dict(schedule="step"), "schedule is 'step', not 'cosine' or 'wsd'"),
        (dict(dtype="int8"), "dtype is 'int8', not 'auto', 'float32', 'bfloat16' or 'float16'"),
        (dict(max_iters=1.5), "max_iters is 1.5, not a whole number"),
        (dict(max_iters=True), "max_iters is True, not a whole number"),
        (dict(learning_rate="fast"), "learning_rate is 'fast', not a number"),
        (dict(compile=1), "compile is 1, not True or False"),
        (dict(total_batch_size=64, gradient_accumulation_steps=2), "say the same thing; give one of them"),
        (dict(fsdp_shard=8), "fsdp_shard = 8 says how fsdp is to shard, and fsdp is false"),
        (dict(fsdp_reshard=True), "fsdp_reshard says how fsdp is to shard, and fsdp is false"),
        (dict(fsdp=True, fsdp_shard=0), "fsdp_shard is 0, not at least 1"),
        (dict(timeout=0.0), "timeout is 0.0, not a number of seconds above 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"TrainConfig: .*{message}"):
        TrainConfig(**fields)


def test_a_whole_number_serves_where_a_float_is_asked():
    assert TrainConfig(learning_rate=1, weight_decay=0) == TrainConfig(learning_rate=1.0, weight_decay=0.0)


def test_a_global_batch_in_tokens():
    assert TrainConfig(batch_size=4, gradient_accumulation_steps=3).windows(8) == 12
    assert TrainConfig(total_batch_size=64).windows(8) == 8
    with pytest.raises(ValueError, match="total_batch_size = 60 tokens are no whole number of windows of 8"):
        TrainConfig(total_batch_size=60).windows(8)


def test_settings_come_back_whole(tmp_path):
    model = GPTConfig.preset("byte-0.1M", dropout=0.1, bias=False)
    config = TrainConfig(learning_rate=1e-5, total_batch_size=2048, sample_prompt='a "b"\n\\ é\u200b', compile=True)
    path = tmp_path / "train.toml"
    path.write_text(settings_text(model, config, data=None, encoding="byte"), encoding="utf-8")
    found = read_settings(path)
    assert found.pop("encoding") == "byte" and "data" not in found
    assert GPTConfig(**{f.name: found.pop(f.name) for f in dataclasses.fields(model) if f.name in found}) == model
    assert TrainConfig(**found) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_iters = ", "bad.toml is not TOML"),
        (b"\xff", "bad.toml is not TOML"),
        (b"max_iter = 3", r"there is no option 'max_iter' \(did you mean 'max_iters'\?\)"),
        (b"[train]\nmax_iters = 3", "there is no option 'train'"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "bad.toml")


@pytest.fixture
def fitted(monkeypatch):
    """The plans that `train` gets; nothing is trained and no sample written."""
    got = []
    monkeypatch.setattr("fastgpt.training.train", lambda plan, *how: got.append(plan))
    monkeypatch.setattr(cli.text, "write", lambda *arguments, **options: None)
    return got


def test_flags_go_over_the_file_and_the_file_over_the_preset(tmp_path, fitted):
    (tmp_path / "a.toml").write_text('preset = "byte-0.1M"\nn_layer = 3\nmax_iters = 7\ndata = "texts"\nseed = 2\n')
    assert cli.main(["train", "--config", str(tmp_path / "a.toml"), "--max-iters=9", "--n_head", "1"]) == 0
    (plan,) = fitted
    assert plan.model == GPTConfig.preset("byte-0.1M", n_layer=3, n_head=1)
    assert plan.config == TrainConfig(max_iters=9, seed=2)
    assert (plan.encoding.name, plan.source, plan.out, plan.resume) == ("byte", "texts", Path("out"), False)


def test_resume_takes_the_runs_own_settings(tmp_path, fitted):
    model = GPTConfig.preset("byte-0.1M", n_layer=1)
    (tmp_path / "train.toml").write_text(settings_text(model, TrainConfig(seed=5), data="texts", encoding="byte"))
    for how in (["--resume"], ["--init_from", "resume"]):
        assert cli.main(["train", "--out_dir", str(tmp_path), *how, "--max_iters", "2000"]) == 0
    plans = [*fitted, plan_run({}, {"max_iters": 2000}, None, None, tmp_path, resume=True)]
    plans.append(plan_run({}, {"max_iters": 2000, "init_from": "resume"}, None, None, tmp_path))
    for plan in plans:
        assert (plan.model, plan.config) == (model, TrainConfig(seed=5, max_iters=2000))
        assert (plan.source, plan.encoding.name, plan.out, plan.resume) == ("texts", "byte", tmp_path, True)


def test_the_encoding_is_the_datas(tmp_path, fitted):
    (tmp_path / "meta.json").write_text('{"encoding": "gpt2", "dtype": "uint16"}')
    assert cli.main(["train", "--data", str(tmp_path)]) == 0
    assert fitted[0].encoding.name == "gpt2"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
def test_a_file_whose_name_is_not_utf8_is_found_again(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 50%.txt")
    Path(name).write_text("hello world " * 300)
    few = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--eval_iters=1", "--sample_tokens=0"]
    out = str(tmp_path / "out")
    assert cli.main(["train", "--data", name, "--out", out, "--max_iters=2", *few]) == 0
    assert cli.main(["train", "--out", out, "--resume", "--max_iters=4"]) == 0
    assert read_settings(tmp_path / "out/train.toml")["data"] == name
    assert load_model(out)[1]["step"] == 4
