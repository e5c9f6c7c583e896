"""The ranges of the config's keys: every key has one, and no bad value gets past it."""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Done
from yacs.config import CfgNode

from torchreid_snloss import ConfigError, distributed, get_default_config, load_config, resolve
from torchreid_snloss.config import leaves
from torchreid_snloss.config.keys import all_keys
from torchreid_snloss.config.ranges import Number, Range, Text

KEYS = all_keys()
DEFAULTS = dict(leaves(get_default_config()))

SELF: list[Any] = []
SELF.append(SELF)
NESTED: Any = "x"
for _ in range(5000):
    NESTED = [NESTED]
# What no key may have, whatever its type.
NEVER = [
    *[float("nan"), float("inf"), float("-inf"), 1e300, -1e300, 10**30, -(10**30), 10**400, 16**5000, 1j],
    *["x" * 5000, "a\0b", "a\nb", "\ud800", b"x", datetime.date(2024, 1, 1), object(), {1: 2}, {"x"}, SELF, NESTED],
    *[[float("nan")], [float("inf")] * 3, [10**30], [10**400], ["a\0b"], [[1]], [None], [""], ["x", "x"], [1] * 2000],
]


def config(*options: Any) -> CfgNode:
    return load_config(options=["use_gpu", False, *options])


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    cfg[name] = value


def test_every_key_has_a_range_that_holds_its_default() -> None:
    assert KEYS.keys() == DEFAULTS.keys()
    for key, known in KEYS.items():
        assert isinstance(known.range, Range), key
        assert known.range.problem(key, DEFAULTS[key]) is None, key
        assert known.range.bounds, key
        if DEFAULTS[key] is not None and not isinstance(DEFAULTS[key], Mapping):
            assert known.range.kind is type(DEFAULTS[key]), key


@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_a_value_that_none_may_have(key: str) -> None:
    cfg = config()
    for value in NEVER:
        set_value(cfg, key, value)
        with pytest.raises(ConfigError, match=re.escape(key.split(".")[-1])) as raised:
            resolve(cfg)
        message = str(raised.value)
        assert "\n" not in message
        assert len(message) < 600


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999", "1e300", "9" * 30, "9" * 400, "9" * 6000, "[nan]", "[[1]]"])
def test_no_option_gives_a_number_or_a_list_such_a_value(value: str) -> None:
    for key, known in KEYS.items():
        if not isinstance(known.range, Text):
            with pytest.raises(ConfigError, match=re.escape(key.split(".")[-1])):
                resolve(config(key, value))


def test_a_number_without_an_upper_bound_is_finite() -> None:
    for value in (float("inf"), float("nan")):
        assert Number(above=0).problem("a.b", value) == f"a.b must be finite, above 0; got a.b {value}"
    assert Number(above=0).problem("a.b", 10**400) is None
    assert Number(above=0).problem("a.b", "1") == "a.b must be a number above 0; got a.b '1'"


# The last value that is refused, and the first that is accepted.
LIMITS = [
    *[("train.seed", 2**32, 2**32 - 1), ("train.seed", -1, 0), ("train.gamma", 0.0, 1e-6), ("train.gamma", 1.1, 1)],
    *[("train.base_lr_mult", -5, 0), ("train.lr", 0, 1e-6), ("train.weight_decay", -1e-6, 0)],
    *[("sampler.num_instances", 0, 1), ("sampler.num_cams", -2, -1), ("model.embedding", [10**10], [8192])],
    *[("test.batch_size", 10**30, 100_000), ("test.batch_size", 0, 1), ("train.micro_batch", 1, 2)],
    *[("video.sample_method", "foo", "random"), ("sampler.train_sampler_t", "foo", "RandomDomainSampler")],
    *[("data.sources", ["market1501", "market1501"], ["market1501", "cuhk03"]), ("test.ranks", [1, 1], [1])],
    *[("data.norm_std", [1, 0, 1], [1, 1, 1]), ("data.norm_mean", [], [0, 0, 0]), ("data.norm_mean", [0.5], [0.5] * 3)],
    *[("adam.beta1", 1, 0.99), ("sgd.dampening", 1, 0.5), ("sgd.momentum", -0.1, 0), ("rmsprop.alpha", 1, 0)],
    *[("loss.sn.scale", 0, 1e-6), ("loss.fidi.alpha", 1, 1.01), ("loss.hap2s.margin", -1, None)],
    *[
        ("loss.triplet.margin", -0.1, 0),
        ("loss.custom.weight_x", -1, 0),
        ("data.save_dir", " ", "a b"),
        ("train.warmup_factor", 0, 1),
    ],
    *[("model.last_stride", 3, 2), ("train.stepsize", [0], [1]), ("data.val_fraction", 1, 0.99)],
    ("data.val_fold", -1, 0),
    *[("data.workers", 257, 256), ("data.height", 4097, 4096), ("test.eval_freq", -2, -1)],
]


@pytest.mark.parametrize(("key", "bad", "good"), LIMITS)
def test_limits(key: str, bad: Any, good: Any) -> None:
    name = "sn" if key == "train.micro_batch" else "softmax"
    cfg = config("loss.name", name, key, good)
    assert resolve(cfg).values[key] == good
    set_value(cfg, key, bad)
    with pytest.raises(ConfigError, match=re.escape(key.split(".")[-1])):
        resolve(cfg)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["video.sample_method", "foo"], "video.sample_method must be one of evenly, random, all, got 'foo'"),
        (["sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 0],
         "sampler.num_instances must be at least 1; got sampler.num_instances 0"),
        (["train.seed", 2**32], "train.seed must be at most 4,294,967,295; got train.seed 4294967296"),
        (["train.gamma", -1], "train.gamma must be above 0 and at most 1; got train.gamma -1.0"),
        (["train.staged_lr", True, "train.base_lr_mult", -5], "train.base_lr_mult must be at least 0"),
        (["model.embedding", [10**10]], "model.embedding must be a list of at most 4 whole numbers from 1 to 8,192"),
        (["test.batch_size", 10**30], "test.batch_size must be at most 100,000"),
        (["data.sources", "['market1501', 'market1501']"], "data.sources must be a list of 1 or more names, all diff"),
        (["loss.name", "sn", "train.micro_batch", 1], "with train.micro_batch 1 would put one image alone through"),
        (["sampler.train_sampler", "RandomIdentitySampler", "sampler.num_instances", 1], "identities, but the"),
        (["train.batch_size", 1], "train.batch_size 1 with train.micro_batch 0 would put one image alone through"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_at_the_command_line(
    options: list[Any], words: str, train: Callable[..., Done]
) -> None:
    code, out, err = train(*options)
    assert code == 2
    assert "epoch: [" not in out
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("torchreid-snloss: error: ")]
    assert words in message


@pytest.mark.parametrize(
    ("batch", "micro_batch", "processes", "alone"),
    [
        (12, 2, 1, False),
        (12, 1, 1, True),
        (12, 11, 1, False),  # 6 and 6
        (9, 2, 1, True),  # 2, 2, 2, 2 and 1
        (9, 4, 1, False),  # 3, 3 and 3
        (9, 3, 3, False),  # 3 on each process
        (9, 2, 3, True),  # 2 and 1
        (15, 3, 2, False),  # 9 on one and 6 on the other, in 3 parts each
        (15, 2, 2, True),  # in 5 parts each, 6 images in one of 2 and four of 1
    ],
)
def test_micro_batches_leave_no_image_alone(
    batch: int, micro_batch: int, processes: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    cfg = config("loss.name", "sn", "train.batch_size", batch, "train.micro_batch", micro_batch,
                 "sampler.num_instances", 3)  # fmt: skip
    if alone:
        with pytest.raises(ConfigError, match="would put one image alone"):
            resolve(cfg)
        cfg.test.evaluate = True
    resolve(cfg)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], CfgNode]:
    def read(text: str) -> CfgNode:
        (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
        return load_config(str(tmp_path / "my.yaml"), ["use_gpu", False])

    return read


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(10))}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1}\ntrain: {seed: 2}", "the key 'train' is there twice, in lines 1 and 2"),
        ("train:\n  lr: 1\n  seed: 2\n  lr: 3", "the key 'lr' is there twice, in lines 2 and 4"),
        ("train: {lr: 1, 'lr': 1}", "the key 'lr' is there twice"),
        ("loss: {custom: {kwargs: {a: 1, a: 2}}}", "the key 'a' is there twice"),
        ("loss: {custom: {kwargs: {a: [{b: 1, b: 2}]}}}", "the key 'b' is there twice"),
        ("train.lr: 1\ntrain: {lr: 1}", "sets 'train.lr' more than once"),
        ("train: {lr: {}}", "train.lr is not a section: it must have a value, as its default 0.0003, got {}"),
        ("train.lr: {}", "train.lr is not a section"),
        ("test: {normalize_feature: {}}", "test.normalize_feature is not a section"),
        ("loss: {sn: {scale: {}}}", "loss.sn.scale is not a section"),
        ("train: {lr: {a: {}}}", "unknown config key 'train.lr.a'"),
        ("trian: {}", "unknown config key 'trian'"),
        ("data: {use_unlabeled_targets: True, load_train_targets: False}", "'data.load_train_targets' more than once"),
        (BOMB, "it is too long: with its aliases"),
        ("data:\n  root: &a " + "x" * 3000 + "\n  sources: [" + "*a, " * 999 + "*a]", "it is too long"),
        ("# " + "x" * 2_000_000, "it is too long"),
        ("data: &a {<<: *a}", "must hold sections of keys"),
        ("train: {&k lr: 1, *k : 2}", "the key 'lr' is there twice"),
        ("data: &a {sources: *a}", "must hold sections of keys"),
        ("data: {sources: &a [*a]}", "must hold sections of keys"),
        ("loss: {custom: {kwargs: &a {x: [*a]}}}", "must hold sections of keys"),
        ("[" * 1500, "must hold sections of keys"),
        ("data: {save_dir: 2024-01-01}", "data.save_dir must be of type str.*, got the date 2024-01-01; text that"),
        ("data: {save_dir: 2024-13-45}", "data.save_dir must be of type str.*, got the date 2024-13-45; text that"),
        ("data: {save_dir: 2024}", "data.save_dir must be of type str.*, got 2024; text that looks .* needs quotes"),
        ("data: {root: [a]}", "data.root must be of type str.*, got .'a'.; text that looks .* needs quotes"),
        ("data: {root: yes}", "data.root must be of type str.*, got True; text that looks .* needs quotes"),
        ("data: {sources: [2024-01-01, [a]]}", r"data.sources must be a list of 1 or more names.*\[the date 2024"),
        ("loss: {custom: {kwargs: {a: 2024-01-01}}}", "loss.custom.kwargs must hold numbers.*the date 2024-01-01"),
        ("train: {seed: 1" + "0" * 400 + "}", r"train.seed must be at most 4,.*\.\.\. \(401 characters\)"),
        ("train: {lr: 1" + "0" * 400 + "}", r"train.lr must be of type float, .*\.\.\. \(401 characters\)"),
        ("train: {lr: 1" + "0" * 5000 + "}", "can't read the config file .*4300 digits.* line 1"),
        ("train: {seed: 0x" + "f" * 9000 + "}", "train.seed must be .*, got a value .* too long to show"),
        ("train: {seed: !!int x}", "can't read the config file .*'x'.* line 1"),
        ("data: {folder: {junk: [2024-01-01]}}", r"data.folder.junk must .*the date 2024-01-01"),
        ("loss: {custom: {kwargs: {a: [2024-01-01]}}}", r"loss.custom.kwargs must .*the date 2024-01-01"),
        ("train: {lr: .nan}", "train.lr must be finite"),
        ("test: {batch_size: -.inf}", "test.batch_size must be of type int"),
        ('data: {save_dir: "a\\0b"}', "data.save_dir must be text of one line"),
    ],
)  # fmt: skip
def test_what_a_config_file_must_not_hold(text: str, words: str, load: Callable[[str], CfgNode]) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=words) as raised:
        resolve(load(text))
    assert time.perf_counter() - began < 60  # and not hours
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("text", ["2024", "1e3", "True", "[a]", "it's", "C:\\data", "'quoted'"])
def test_text_that_looks_like_something_else_may_be_given_as_text(text: str, load: Callable[[str], CfgNode]) -> None:
    cfg = load(yaml.safe_dump({"data": {"root": text}}))
    assert cfg.data.root == text.strip("'")
    assert load(str(resolve(cfg).cfg_text)).data.root == cfg.data.root
    assert load_config(options=["data.root", text]).data.root == cfg.data.root


def test_a_key_that_a_script_misspells_is_refused() -> None:
    cfg = get_default_config()
    cfg.train.max_epochs = 3
    with pytest.raises(ConfigError, match=r"unknown config key 'train.max_epochs', did you mean train.max_epoch"):
        resolve(cfg)


def test_a_test_does_not_need_what_training_needs() -> None:
    resolve(config("train.sync_batchnorm", True, "test.evaluate", True))
    with pytest.raises(ConfigError, match=r"train\.sync_batchnorm True needs GPUs"):
        resolve(config("train.sync_batchnorm", True))


@pytest.mark.parametrize(
    ("loss", "sampler", "refused"),
    [
        ("softmax", "RandomSampler", False),
        ("softmax", "IdentitySampler", True),
        ("sn", "RandomSampler", True),
    ],
)
def test_parts_of_a_batch_on_two_processes(
    loss: str, sampler: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 images in groups of 4 are 8 and 4, in 3 parts; alone, they are 6 and 6, in 2."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    cfg = config("loss.name", loss, "sampler.train_sampler", sampler, "train.batch_size", 12, "train.micro_batch", 3)
    with pytest.raises(ConfigError, match="would put one image alone") if refused else contextlib.nullcontext():
        resolve(cfg)


def test_a_section_may_be_empty(load: Callable[[str], CfgNode], capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load("train:\n  # lr: 1\nloss: {sn: , custom: {kwargs: }}\ndata: {save_dir: '2024-01-01'}")
    expected = config("data.save_dir", "'2024-01-01'")
    assert resolve(cfg).values == resolve(expected).values
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"=> config section {name} is empty" for name in ("train", "loss.sn", "loss.custom.kwargs")]


def test_aliases_and_merge_keys_may_be_used(load: Callable[[str], CfgNode]) -> None:
    cfg = load("data: {sources: &s [market1501], targets: *s}\ntrain: {<<: &t {lr: 0.1, seed: 3}, lr: 0.2}")
    assert (cfg.data.targets, cfg.train.lr, cfg.train.seed) == (["market1501"], 0.2, 3)


@pytest.mark.parametrize("option", ["-" * 100_000 + "1", "(" * 5000, "[" * 5000, "{'a': " * 3000])
def test_an_option_that_is_nested_too_deep_is_refused(option: str) -> None:
    for key in ("train.seed", "data.sources", "loss.custom.kwargs", "train.lr"):
        with pytest.raises(ConfigError, match=re.escape(key)):
            config(key, option)
