"""PyPI's layout of torchreid and upstream's; and that importing this package changes neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, process_options, run


def test_engines_under_upstreams_layout(upstream_layout: Path) -> None:
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests/test_engines.py")]
    script = f"import sys, pytest, torchreid.engine; print(torchreid.__file__); sys.exit(pytest.main({arguments}))"
    done = run("-c", script, path=upstream_layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(upstream_layout))


def test_command_line_under_upstreams_layout(upstream_layout: Path, reid_data: Path, tmp_path: Path) -> None:
    flags = ["-s", "market1501", "-t", "market1501", "--root", str(reid_data)]
    options = process_options("loss.name", "fidi", "train.max_epoch", 1)
    done = run("-m", "torchreid_snloss", *flags, *options, cwd=tmp_path, path=upstream_layout)
    assert done.returncode == 0, done.stderr
    assert "mAP:" in done.stdout


PROBE = """
import torchreid
from torchreid import data, engine, losses, models
def state():
    return [dir(losses), dir(engine), models.build_model, list(data.sampler.AVAI_SAMPLERS),
            data.sampler.build_train_sampler, data.datamanager.build_train_sampler]
before = state()
import torchreid_snloss
assert state() == before, "importing changed torchreid"
torchreid_snloss.register()
assert state() != before
"""


def test_importing_changes_nothing() -> None:
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr


TAKEN = """
import torchreid_snloss
from torchreid import data, losses
def refused(words):
    for _ in range(2):  # the second time too
        try:
            torchreid_snloss.register()
        except RuntimeError as error:
            assert words in str(error), error
        else:
            raise AssertionError("registered")
losses.SNLoss = 1
refused("has a SNLoss already")
del losses.SNLoss
data.sampler.AVAI_SAMPLERS.append("IdentitySampler")
refused("a sampler named")
data.sampler.AVAI_SAMPLERS.remove("IdentitySampler")
data.register_video_dataset("synthetic_video", 1)
refused("a data set named 'synthetic_video'")
data.register_image_dataset("synthetic", 1)
refused("a data set named 'synthetic'")
"""


def test_register_refuses_what_it_would_overwrite() -> None:
    done = run("-c", TAKEN, fresh=False)
    assert done.returncode == 0, done.stderr


# The last thing that register() changes can't be changed: everything before it has to be put back.
UNDONE = """
import sys
from torchreid import data, engine, losses, metrics, models, utils
import torchreid_snloss
data.sampler.AVAI_SAMPLERS = BAD
places = [losses, engine, models, data.sampler, data.datamanager, metrics, metrics.rank, utils,
          sys.modules[engine.Engine.__module__]]
def state():
    names = [{**vars(place)} for place in places]
    return names, {**vars(data.datasets)["__image_datasets"]}, {**vars(data.datasets)["__video_datasets"]}
before = state()
try:
    torchreid_snloss.register()
except AttributeError as error:
    assert "append" in str(error)
else:
    raise SystemExit("register() went through")
assert state() == before, "register() left something behind"
data.sampler.AVAI_SAMPLERS = ["RandomSampler"]
torchreid_snloss.register()
names, images, videos = state()
assert "SNLoss" in names[0] and "synthetic" in images and "synthetic_video" in videos
assert data.sampler.AVAI_SAMPLERS == ["RandomSampler", "IdentitySampler"]
"""


@pytest.mark.parametrize("layout", ["PyPI's", "upstream's"])
def test_register_changes_nothing_if_it_raises(layout: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("upstream_layout") if layout == "upstream's" else None
    done = run("-c", UNDONE.replace("BAD", "('RandomSampler',)"), path=path, fresh=bool(path))
    assert done.returncode == 0, done.stderr
