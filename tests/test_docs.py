"""The README and the documentation are true: every block runs, keys and messages are the code's, the site builds."""

from __future__ import annotations

import ast
import contextlib
import functools
import glob
import importlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn
from torchreid import data, models, utils

import torchreid_snloss
from torchreid_snloss import get_default_config, load_config
from torchreid_snloss.data import SyntheticPedestrians, SyntheticTracklets, make_pedestrians
from torchreid_snloss.engine import TrainingLoop
from torchreid_snloss.inference import export, features

pytestmark = pytest.mark.docs

SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language with what follows it, its text, and where it starts."""

    language: str
    info: str
    text: str
    page: Path
    line: int

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^( *)(`{3,}|~{3,})(\S*)([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(text):
        indent = len(found[1])
        body = "".join(line[indent:] for line in found[5].splitlines(keepends=True))
        yield Block(found[3], found[4].strip(), body, page, text[: found.start()].count("\n") + 1)


# What a line of the docs gets besides, so that it takes seconds: the last word is the last option's.
SMALL = (
    "train.max_epoch 1 data.height 64 data.width 32 data.workers 0 train.batch_size 32 train.print_freq 1 "
    "train.fixbase_epoch 0 train.warmup_epochs 0 train.stepsize [1] test.ranks [1,5] test.visrank_topk 3 "
    "model.pretrained False model.name osnet_x0_25 use_gpu False"
)
SMALL_VIDEO = f"{SMALL} train.batch_size 8 video.seq_len 2 test.batch_size 8 sampler.num_instances 2"


def shrunk(argv: list[str]) -> list[str]:
    extra = (SMALL_VIDEO if any("video" in word for word in argv) else SMALL).split()
    given = dict(zip(argv[::-1][1::2], argv[::-1][::2]))  # options stand in pairs at the end
    if "train.micro_batch" in given:
        extra += ["train.micro_batch", "16"]
    if "--train-fraction" in argv:
        extra += ["train.batch_size", "16"]  # of the 4 identities that are left
    return [*argv, *extra]


def cli_main(argv: list[str]) -> int:
    return importlib.import_module("torchreid_snloss.cli").main(shrunk(argv))


def compare_main(argv: list[str]) -> int:
    """One seed and two trials in the place of several, and few losses."""
    few = {"triplet", "hap2s", "fidi"} if "sn" in argv else {"triplet", "hap2s"}
    argv = [word for word in shrunk(argv) if word not in few]
    if "--seeds" in argv:
        argv[argv.index("--seeds") + 1] = "1"
    else:
        argv = ["--seeds", "1", *argv]
    if "--tune" in argv:
        argv[argv.index("--tune") + 1] = "2"
    if "--losses" not in argv and "--variants" not in argv:
        argv = ["--losses", "softmax", "sn", *argv]
    code = importlib.import_module("torchreid_snloss.compare").main(argv)
    return int(code)


class RunHere:
    """A process that a comparison starts, ``python ... -m torchreid_snloss ...``, in this one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.argv = command[command.index("torchreid_snloss") + 1 :]

    def wait(self, timeout: float | None = None) -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("torchreid_snloss.cli").main(self.argv)


# Of a page that shows an engine alone.
GIVEN = """
datamanager = torchreid.data.ImageDataManager(
    root="reid-data", sources="market1501", num_instances=4, train_sampler="IdentitySampler"
)
model = torchreid.models.build_model("osnet_x0_25", datamanager.num_train_pids, loss="triplet")
optimizer = torchreid.optim.build_optimizer(model)
scheduler = None
"""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "torchreid-snloss": cli_main,
    "torchreid-snloss-compare": compare_main,
    "torchreid-snloss-export": lambda argv: int(export.main(shrunk(argv))),
    "torchreid-snloss-features": lambda argv: int(features.main(shrunk(argv))),
}
SCRIPTS = {
    "own_images.py": ["--epochs", "1", "--batch-size", "32", "--workers", "0"],
    "swap_the_loss.py": ["--epochs", "1"],
}
"""What scripts that take no options get besides, so that they take seconds."""


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Python code, which builds full models on full images for dozens of epochs, does so on little for one epoch."""
    build, run, prepare = models.build_model, TrainingLoop.run, data.ImageDataManager.__init__

    def small_model(name: str, num_classes: int, *args: Any, **kwargs: Any) -> nn.Module:
        if args:  # within the other build_model
            return build(name, num_classes, *args, **kwargs)
        if name.startswith("timm/"):
            return build("timm/test_vit", num_classes, **{**kwargs, "pretrained": False})
        return build("osnet_x0_25", num_classes, **{**kwargs, "pretrained": False})

    def short_run(self: Any, *args: Any, **kwargs: Any) -> None:
        run(self, *args, **{**kwargs, "max_epoch": min(1, kwargs.get("max_epoch", 1)), "ranks": [1, 5]})

    def small_data(self: Any, **kwargs: Any) -> None:
        prepare(self, **{**kwargs, "height": 64, "width": 32, "batch_size_train": 32, "workers": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_model", small_model)
        patch.setattr(TrainingLoop, "run", short_run)
        patch.setattr(data.ImageDataManager, "__init__", small_data)
        if not torch.cuda.is_available():
            patch.setattr(nn.Module, "cuda", lambda self: self)
        yield


class Runner:
    """Runs the blocks of a page one after the other, in one folder and one namespace."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        features = torch.randn(16, 32)
        labels = torch.arange(4).repeat_interleave(4)
        # What a page's blocks may take as given: a batch, torch, torchreid and this package.
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "features": features,
            "embeddings": features,
            "pids": labels,
            "labels": labels,
            "torch": torch,
            "torchreid": importlib.import_module("torchreid"),
            "torchreid_snloss": torchreid_snloss,
        }

    def run(self, block: Block) -> None:
        kinds = {"sh": self.sh, "python": self.python, "yaml": self.yaml, "diff": self.diff, "text": self.text}
        kinds["bibtex"] = self.bibtex
        if block.language not in kinds:
            pytest.fail(f"{block.place}: a block must be one of {', '.join(kinds)}, got {block.language!r}")
        try:
            kinds[block.language](block)
        except Exception as error:
            pytest.fail(f"{block.place}: {type(error).__name__}: {error}")

    def sh(self, block: Block) -> None:
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
        assert lines
        for line in lines:
            if line.startswith("python3 -m venv "):
                self.virtual_environment(line)
            else:
                self.command(shlex.split(line))

    def command(self, words: list[str]) -> None:
        program, *rest = words
        if program in COMMANDS:
            assert COMMANDS[program](rest) == 0, words
        elif program == "python" and rest[0].startswith("examples/"):
            script = ROOT / rest[0]
            given = [word for pattern in rest[1:] for word in (sorted(glob.glob(pattern)) or [pattern])]
            takes_options = "cfg.merge_from_list" in script.read_text() or "REMAINDER" in script.read_text()
            more = shrunk(given) if takes_options else [*given, *SCRIPTS.get(script.name, [])]
            self.monkeypatch.setattr(sys, "argv", [str(script), *more])
            runpy.run_path(str(script), run_name="__main__")
        elif program == "torchrun":
            self.torchrun(rest)
        else:
            raise AssertionError(f"no way to run {program!r} here")

    def virtual_environment(self, line: str) -> None:
        """CI runs the line that ends with pytest; of another the last command is run, and the extras are looked up."""
        make, install, last = (shlex.split(part) for part in line.split("&&"))
        assert make == ["python3", "-m", "venv", ".venv"]
        assert install[:2] == [".venv/bin/pip", "install"]
        assert set(install[2:-1]) <= {"-e"}
        for extra in re.findall(r"\w+", install[-1]):
            assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
        pattern = re.search(r"grep -E '(.*)' README.md", (ROOT / ".ci/run").read_text())
        assert pattern is not None
        if last == [".venv/bin/pre-commit", "install"]:  # it would change the clone that the tests are of
            assert '"pre-commit"' in (ROOT / "setup.py").read_text()
        elif not re.match(pattern[1], line):
            program, *rest = last
            self.command([program.removeprefix(".venv/bin/"), *rest])
        else:
            readme = (ROOT / "README.md").read_text().splitlines()
            assert [found for found in readme if re.match(pattern[1], found)] == [line]

    def torchrun(self, words: list[str]) -> None:
        processes = words.index("--nproc-per-node") + 1
        assert int(words[processes]) >= 1
        words[processes] = "2"
        module = words.index("-m")
        assert words[module + 1] == "torchreid_snloss"
        own, rest = words[: module + 2], words[module + 2 :]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *own, *shrunk(rest)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "mAP:" in done.stdout

    def python(self, block: Block) -> None:
        # Not the form on one line, which is Python and would be formatted.
        if included := re.fullmatch(r"--8<--\n(examples/\w+\.py)\n--8<--\n", block.text):
            # which a test of its own runs
            assert Path(included[1]).name in (ROOT / "tests/test_examples.py").read_text()
            compile((ROOT / included[1]).read_text(), included[1], "exec")
            return
        if named := re.fullmatch(r'title="(\w+\.py)"', block.info):  # a module for the blocks that follow
            (self.folder / named[1]).write_text(block.text, encoding="utf-8")
            self.monkeypatch.syspath_prepend(self.folder)
            return
        if re.search(r"\bdatamanager, model, optimizer\b", block.text) and "datamanager" not in self.names:
            self.python(Block("python", "", GIVEN, block.page, block.line))
        with small():
            exec(compile("\n" * block.line + block.text, str(block.page), "exec"), self.names)

    def yaml(self, block: Block) -> None:
        if named := re.fullmatch(r'title="(\w+\.yaml)"', block.info):  # a file for the commands that follow
            (self.folder / named[1]).write_text(block.text, encoding="utf-8")
            return
        if block.info:
            assert block.info == 'title="fast-reid"'
            self.fast_reid(block)
            return
        path = self.folder / "block.yaml"
        path.write_text(block.text, encoding="utf-8")
        load_config(str(path))

    def fast_reid(self, block: Block) -> None:
        """Every key of another project's config has its row in the page's table, and ours in it exist."""
        rows = [line.split("|") for line in block.page.read_text().splitlines() if re.match(r"\| `[A-Z]+[._]", line)]
        assert len(rows) > 10
        theirs = {key for row in rows for key in re.findall(r"`([A-Z][\w.]+)`", row[1])}
        ours = {key for row in rows for key in re.findall(r"`([^`]+)`", row[2])}
        assert not set(keys_of(yaml.safe_load(block.text))) - theirs
        assert not ours - set(keys_of(get_default_config()))

    def diff(self, block: Block) -> None:
        """Both sides are true: as Python they run, as YAML they load."""
        lines = block.text.splitlines()
        assert all(line[:1] in ("+", "-", " ") for line in lines)
        assert {"+", "-"} <= {line[0] for line in lines}
        for side in "-+":
            text = "\n".join(line[1:] for line in lines if line[0] in (" ", side)) + "\n"
            part = Block("python", "", text, block.page, block.line)
            if is_python(text):
                self.python(part)
            else:
                self.yaml(part)

    def bibtex(self, block: Block) -> None:
        """An entry that CITATION.cff has too, with the same words."""
        entry = dict(re.findall(r"^  (\w+) *= \{(.*)\}", block.text, re.MULTILINE))
        papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
        (paper,) = [paper for paper in papers if paper["title"] == entry["title"]]
        names = [f"{name['family-names']}, {name['given-names']}" for name in paper["authors"]]
        assert entry["author"] == " and ".join(names)
        assert entry["year"] == str(paper["year"])
        assert {entry[key] for key in ("note", "doi") if key in entry} == {i["value"] for i in paper["identifiers"]}
        if "pages" in entry:
            assert (entry["pages"], entry["volume"]) == (f"{paper['start']}--{paper['end']}", str(paper["volume"]))

    def text(self, block: Block) -> None:
        """Output or a drawing, which nothing runs. Lines that the programs print are in their sources."""
        for line in block.text.splitlines():
            if line.startswith(("=> ", "** ", "Best so far", "Checkpoint saved")):
                message = re.sub(
                    r"""'[\w/-]+'|a folder for each person|\d cameras|"[^"]*"|\d[\d.]*%?|"""
                    r"""the test set \w+|Synthetic\w+""",
                    "…",
                    line,
                )
                assert in_source(message) or in_source(message, "torchreid"), line


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def keys_of(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with few people, under the names that the docs use."""
    root = tmp_path_factory.mktemp("data")
    make_pedestrians(root / "market1501", num_train_pids=16, num_test_pids=8)
    shutil.copytree(root / "market1501", root / SyntheticPedestrians.dataset_dir)
    (query,) = (root / "market1501").rglob("query")
    shutil.copytree(query.parent, root / "dukemtmc-reid/DukeMTMC-reID")
    make_pedestrians(root / SyntheticTracklets.dataset_dir, num_train_pids=8, num_test_pids=4, frames=2)
    return root


@pytest.fixture
def runner(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A folder as a user has it: a clone's configs and examples, torchreid's config, data, a trained checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ("reid-data", "ROOT", "split-1"):
        (tmp_path / name).symlink_to(drawn, target_is_directory=True)
    shutil.copytree(drawn, tmp_path / "split-2")  # a root that is named twice is refused
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for source in drawn.rglob("market1501/**/*.jpg"):
        pid, camera, *_ = source.name.split("_")
        person = tmp_path / "my-images" / pid
        person.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, person / f"cam{camera[1]}_{source.stem[-9:]}.jpg")
    for name in ("query", "bounding_box_test"):
        shutil.copytree(drawn / "market1501/Market-1501-v15.09.15" / name, tmp_path / "my-test-images" / name)
    theirs = {  # torchreid's config of this name, as of its last commit
        "model": {"name": "osnet_x1_0", "pretrained": True},
        "data": {
            "type": "image",
            "sources": ["market1501"],
            "targets": ["market1501"],
            "height": 256,
            "width": 128,
            "combineall": False,
            "transforms": ["random_flip"],
            "save_dir": "log/osnet_x1_0_market1501_softmax_cosinelr",
        },
        "loss": {"name": "softmax", "softmax": {"label_smooth": True}},
        "train": {
            "optim": "amsgrad",
            "lr": 0.0015,
            "max_epoch": 250,
            "batch_size": 64,
            "fixbase_epoch": 10,
            "open_layers": ["classifier"],
            "lr_scheduler": "cosine",
        },
        "test": {
            "batch_size": 300,
            "dist_metric": "euclidean",
            "normalize_feature": False,
            "evaluate": False,
            "eval_freq": -1,
            "rerank": False,
        },
    }
    Path("im_osnet_x1_0_softmax_256x128_amsgrad_cosine.yaml").write_text(yaml.safe_dump(theirs))
    trained = Path("log/osnet_x1_0_market1501_softmax_cosinelr/model/model.pth.tar-250")
    trained.parent.mkdir(parents=True)
    torch.save({"state_dict": models.build_model("osnet_x0_25", 16, pretrained=False).state_dict()}, trained)

    torchreid_snloss.register()  # before small() puts something in the place of what it changes
    here = types.SimpleNamespace(**{**vars(subprocess), "Popen": RunHere})
    monkeypatch.setattr(importlib.import_module("torchreid_snloss.compare.runs"), "subprocess", here)
    monkeypatch.setattr(utils, "collect_env_info", lambda: "")  # it runs pip and more, for seconds
    return Runner(tmp_path, monkeypatch)


# TensorBoard's thread writes to a relative path, and may do so once more when the test has left its folder.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page(page: Path, runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    if page.parent.name == "how-to":  # which begin with a trained model
        (trained,) = Path("log").rglob("model.pth.tar-250")
        Path("log/small/model").mkdir(parents=True)
        shutil.copy(trained, "log/small/model/model-best.pth.tar")
    for block in blocks_of(page):
        runner.run(block)
    if page.stem == "index":  # which explains the columns of what it prints
        out = capsys.readouterr().out
        columns = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page.read_text(), re.MULTILINE)))
        assert len(columns) == 8
        assert not [name for name in columns if f"\t{name} " not in out]


def anchors_of(page: Path) -> set[str]:
    """What a link into the page may name, as GitHub and the site make it of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = ROOT / "README.md"
    assert readme.stat().st_size <= 8000
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", readme.read_text())
    local = [(ROOT / path, anchor) for path, anchor in links if not path.startswith("https://")]
    assert len(local) > 10
    assert not [path for path, _ in local if not path.exists()]
    assert not [(path.name, anchor) for path, anchor in local if anchor and anchor not in anchors_of(path)]


def long_description(folder: Path, repository: str) -> tuple[str, str]:
    """The package's metadata as an index reads them, headers and text, with another address of the repository."""
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "torchreid_snloss").mkdir()
    shutil.copy(ROOT / "torchreid_snloss/__init__.py", folder / "torchreid_snloss")
    setting = (ROOT / "pyproject.toml").read_text().replace('\nrepository = ""', f'\nrepository = "{repository}"')
    (folder / "pyproject.toml").write_text(setting)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    headers, text = (folder / "torchreid_snloss.egg-info/PKG-INFO").read_text(encoding="utf-8").split("\n\n", 1)
    return headers, text


def test_links_work_on_a_package_index(tmp_path: Path) -> None:
    home = "https://github.com/someone/torchreid-snloss"
    headers, text = long_description(tmp_path, home)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20
    assert not [target for target in targets if not target.startswith(("https://", "#"))]
    assert {f"{home}/raw/main/docs/images/ranked.jpg", f"{home}/blob/main/docs/flag.md#checkpoints"} <= set(targets)
    assert f"[![Tests]({home}/actions/workflows/tests.yml/badge.svg)]" in text
    assert f"Project-URL: Changelog, {home}/blob/main/CHANGELOG.md" in headers
    assert "Author: the torchreid-snloss developers" in headers


def test_versions_are_the_same_everywhere() -> None:
    """Those that the package claims, the workflow tests, and the README shows."""
    setup = (ROOT / "setup.py").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    matrix, steps = workflow["strategy"]["matrix"], workflow["steps"]
    assert {"run": ".ci/run"} in steps
    assert 'python_requires=">=3.10"' in setup
    assert matrix["python"] == [f"3.{minor}" for minor in eval(re.search(r"range\(\d+, \d+\)", setup)[0])]  # type: ignore[index]
    assert f'"torch>={matrix["torch"][0]}"' in setup
    assert f"torch=={matrix['torch'][0]}.*" in str(steps)
    readme = (ROOT / "README.md").read_text()
    assert f"Python {matrix['python'][0]} to {matrix['python'][-1]}]" in readme
    assert f"PyTorch {matrix['torch'][0]} or newer]" in readme


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```sh\nb\n```\n:   c\n\n    ```text\n    d\n      e\n    ```\n\n```\nf\n```\n")
    assert [(b.language, b.text, b.line) for b in blocks_of(page)] == [
        ("sh", "b\n", 2),
        ("text", "d\n  e\n", 7),
        ("", "f\n", 12),
    ]
    assert all(sum(1 for _ in blocks_of(p)) * 2 == len(re.findall(r"^ *```", p.read_text(), re.M)) for p in PAGES)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("", "x"),
        ("js", "x"),
        ("sh", "ls"),
        ("sh", "torchreid-snloss loss.nam sn"),
        ("sh", "python3 -m venv .venv && .venv/bin/pip install '.[tets]' && .venv/bin/pytest"),
        ("python", "unknown_name"),
        ("yaml", "loss: {nam: sn}"),
        ("diff", "-unknown_name\n+1"),
        ("diff", " loss:\n-  name: sn\n+  nam: sn"),
        ("text", "=> test.normalize: True, as loss 'sn' normalises features too"),
    ],
)
def test_a_wrong_block_fails(language: str, text: str, runner: Runner) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        runner.run(Block(language, "", text, ROOT / "README.md", 1))


def site_module(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/site" / name))


def test_every_key_stands_once_on_its_page() -> None:
    hooks = site_module("hooks.py")
    page = hooks["on_page_markdown"]((ROOT / "docs/keys.md").read_text())
    keys = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(keys) == sorted(keys_of(get_default_config()))
    # Of each source one: the tables of keys, a loss's docstring, its base's, the engine's.
    for row in (
        "| `train.keep` | int | from 0 to 1,000,000 | `3` | Newest checkpoints to keep; 0: all |",
        "| `loss.sn.num_neighbors` | int | at least 1 and at most 1,000,000,000 | `10` | $K$, the size of the",
        "| `loss.fidi.weight_m` | float | at least 0 and at most 1,000,000 | `1.0` | Weight of the metric term",
    ):
        assert row in page
    assert "| `loss.hap2s.block_size` | int | at least 0 and at most 1,000,000,000 | `0` | Anchors at a time" in page


MESSAGE = re.compile(r"^### (`+) ?(.+?) ?\1(?: \((torch|torchreid|Python)\))?$", re.MULTILINE)


def strings_of(path: Path) -> Iterator[str]:
    """The strings of a module, parts that lie side by side as one, with … for what is put in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("{}", "…")


@functools.cache
def strings_in(package: str) -> list[str]:
    folder = Path(importlib.import_module(package).__path__[0])
    return [text for path in sorted(folder.rglob("*.py")) for text in strings_of(path)]


def in_source(message: str, package: str = "torchreid_snloss") -> bool:
    """Whether a string of the package has the message's fixed parts, in order."""
    fixed = [part.strip() for part in message.split("…") if part.strip(" :,()'\"")]
    return bool(fixed) and any(has_in_order(text, fixed) for text in strings_in(package))


def has_in_order(text: str, parts: list[str]) -> bool:
    start = 0
    for part in parts:
        start = text.find(part, start)
        if start < 0:
            return False
        start += len(part)
    return True


def test_messages_are_those_of_the_source() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = MESSAGE.findall(page)
    assert len(messages) == page.count("\n### ") >= 60
    names = [message for _, message, _ in messages]
    assert len(set(names)) == len(names)
    packages = {"": "torchreid_snloss", "torchreid": "torchreid"}
    wrong = [text for _, text, whose in messages if whose in packages and not in_source(text, packages[whose])]
    assert not wrong
    assert not in_source("unknown config keys …")
    assert not in_source("options come in pairs, …, KEY VALUE")


# Sphinx's markup, a doctest that the site would not show as code, a description that Markdown takes for a quotation.
NOT_MARKDOWN = re.compile(
    r":(?:class|func|meth|mod|attr|math):`|^ *\.\. \w+::|::$|(?<!`)``(?!`)|^ *Example:\n+ +>>>|^ +[*\w, ]+: >",
    re.MULTILINE,
)


def test_docstrings_are_markdown() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {found[0].strip()}"
        for path in sorted((ROOT / "torchreid_snloss").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for found in NOT_MARKDOWN.finditer(ast.get_docstring(node) or "")
    ]
    assert not wrong


def test_files_of_the_structure_exist() -> None:
    package = ROOT / "torchreid_snloss"
    page = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"`([\w/]+\.(?:py|html))`", page)
    drawn = re.findall(r"\b(\w+\.py)\b", page[: page.index("## What")])
    assert len(table) > 30
    assert len(drawn) > 30
    assert not [name for name in table if not (package / name).is_file()]
    names = {path.name for path in package.rglob("*.py")}
    assert not set(drawn) - names
    # Nobody looks in vain for a file of the package, but for those without a concern of their own.
    assert not names - {Path(name).name for name in table + drawn} - {"__init__.py", "__main__.py"}


def test_the_figure_is_the_losses(tmp_path: Path) -> None:
    penalties = site_module("penalties.py")
    d = torch.tensor([0.2, 1.0], dtype=torch.float64)
    values, slopes = penalties["of_distances"](torchreid_snloss.SNLoss(scale=2.0), [d], [d + 0.5])
    away = torch.full((2,), 0.5, dtype=torch.float64)
    expected = torch.nn.functional.softplus(-2 * away) + 0.1 * d
    torch.testing.assert_close(torch.from_numpy(values), expected)
    torch.testing.assert_close(torch.from_numpy(slopes[:, 0] + slopes[:, 1]), torch.full_like(d, 0.1))
    penalties["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("penalties*")}
    assert drawn >= set(re.findall(r"images/(penalties[\w.-]+)", (ROOT / "docs/losses.md").read_text()))


def test_the_published_site_has_edit_links(tmp_path: Path) -> None:
    hook = site_module("published.py")["on_config"]
    config = types.SimpleNamespace(repo_url=None, edit_uri=None, theme={"features": []}, extra={})
    assert hook(config).edit_uri is None  # as long as nothing is published
    (tmp_path / "pyproject.toml").write_text('repository = "https://github.com/someone/torchreid-snloss/"\n')
    hook.__globals__["_PYPROJECT"] = tmp_path / "pyproject.toml"
    hook(config)
    assert (config.repo_url, config.edit_uri) == ("https://github.com/someone/torchreid-snloss", "edit/main/docs/")
    assert config.repo_name == "someone/torchreid-snloss"
    assert config.theme["features"] == ["content.action.edit"]


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert pages.keys() >= {page.stem for page in SITE}
    assert "<math" in pages["losses"]
    for name in ("losses", "api"):
        text = re.sub(r"<(code|math|pre).*?</\1>", "", pages[name], flags=re.DOTALL)
        assert not re.findall(r"\\\(|\$|:class:|\.\. math", text), name
    for name in {*torchreid_snloss.__all__, "register.register"} - {"register"}:  # a module has its name
        assert f'id="torchreid_snloss.{name}"' in pages["api"], name
    assert "every key --" not in pages["keys"]
    assert "<blockquote" not in pages["api"]  # as a description that starts with ">" would be
    # Nothing is loaded from elsewhere.
    assert not [url for page in pages.values() for url in re.findall(r'(?:src|stylesheet" href)="(https?:[^"]+)', page)]


def test_figures_that_are_repeated_are_those_of_the_table() -> None:
    """A difference with its interval, on another page or in a summary, is one that stands in a table of the results."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0]: part for part in page.split("\n## ")}
    in_brackets = r"([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\]"
    in_short = re.findall(r"^\| \[.*\]\(#([\w-]+)\) \|(.*)$", sections["In short"], re.MULTILINE)
    assert len(in_short) >= 6
    for anchor, cells in in_short:  # with their signs, in the section that the row links to
        (section,) = (text for title, text in sections.items() if title.lower().replace(" ", "-") == anchor)
        assert set(re.findall(in_brackets, cells)) <= set(re.findall(in_brackets, section)), anchor

    signs = str.maketrans("", "", "+-")
    tables = "".join(re.findall(r"^\|.*\n", page.replace(sections["In short"], ""), re.MULTILINE))
    figures = re.findall(in_brackets, tables)
    table = {(found[0][1:], *sorted(end.translate(signs) for end in found[1:])) for found in figures}
    in_words = r"(\d+\.\d)\s+(?:points of mAP\s+)?\([^()]*?(-?\d+\.\d)\s+to\s+(-?\d+\.\d)\)"
    texts = "".join(other.read_text(encoding="utf-8") for other in PAGES)
    repeated = [(found[0], *sorted(end.translate(signs) for end in found[1:])) for found in re.findall(in_words, texts)]
    assert len(repeated) >= 2
    assert [figure for figure in repeated if figure not in table] == []
