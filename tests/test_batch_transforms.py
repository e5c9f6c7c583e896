"""Transforms of whole batches give torchreid's images; random numbers follow from seed, epoch and image."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, Tiny, make_datamanager, make_engine
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchreid import data, utils
from torchvision import transforms

import torchreid_snloss
from torchreid_snloss import ImageSNEngine
from torchreid_snloss.data import SyntheticTracklets, make_pedestrians, use_batch_transforms
from torchreid_snloss.data.batch_transforms import _planar, batched
from torchreid_snloss.data.batches import BatchTransforms
from torchreid_snloss.data.box_transforms import _rotated
from torchreid_snloss.data.cache import CacheError, ImageCache, available_memory, cache_images
from torchreid_snloss.data.decoded import DECODED, decode_array
from torchreid_snloss.data.draws import Draws, image_keys
from torchreid_snloss.data.readable import UnreadableImageError, decode
from torchreid_snloss.engine import Stopped

ALL = ["random_flip", "random_crop", "random_patch", "color_jitter", "random_erase"]
SIZE = (64, 32)


def with_batch_transforms(datamanager: Any, seed: int = 1) -> Any:
    """A copy of a data manager whose loaders transform batches."""
    made = copy.copy(datamanager)
    made.test_loader = {name: dict(splits) for name, splits in datamanager.test_loader.items()}
    use_batch_transforms(made, seed, use_gpu=False)
    return made


# ---- the same images ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes and formats: JPEGs in all ways of storing colour, grey ones, a PNG with a palette."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate(
        [(128, 64), (128, 64), (61, 33), (97, 40), (64, 32), (300, 151), (32, 16)]
    ):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)).resize((width, height))
        for name, options in {
            "420.jpg": {}, "444.jpg": {"subsampling": 0}, "422.jpg": {"subsampling": 1}, "p.jpg": {"progressive": True},
            "L.jpg": {}, "CMYK.jpg": {}, "P.png": {},
        }.items():  # fmt: skip
            mode = name.split(".")[0]
            made.append(folder / f"{number}-{name}")
            (smooth.convert(mode) if mode in ("L", "CMYK", "P") else smooth).save(made[-1], **options)
    return made


def test_decodes_as_pillow(files: list[Path]) -> None:
    for file in files:
        np.testing.assert_array_equal(decode_array(str(file)), np.asarray(decode(str(file))), err_msg=file.name)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a.png", np.uint16, "16 or more bits a channel"),
        ("a.tif", np.uint16, "16 or more bits a channel"),
        ("b.tif", np.int32, "16 or more bits a channel"),
        ("c.tif", np.float32, "floating-point values a channel"),
    ],
)
def test_an_image_of_more_than_8_bits_is_refused(name: str, kind: Any, words: str, tmp_path: Path) -> None:
    file = str(tmp_path / name)
    Image.fromarray(np.linspace(0, 60_000, 64 * 32).reshape(SIZE).astype(kind)).save(file)
    for read in (decode, decode_array, lambda path: ImageCache.filled([path], 1)):
        with pytest.raises(UnreadableImageError, match=rf"{name}'.*it has {words} .*: convert it to 8 bits a channel"):
            read(file)


def test_test_images_are_torchreids(files: list[Path], reid_data: Path) -> None:
    theirs = make_datamanager(reid_data, batch_size_test=20, norm_mean=[0.4, 0.5, 0.6], norm_std=[0.1, 0.2, 0.3])
    for splits in theirs.test_loader.values():
        splits["query"].dataset.data = [(str(file), 0, 1, 0) for file in files]
    ours = with_batch_transforms(theirs)
    batches = [list(manager.test_loader["market1501"]["query"]) for manager in (ours, theirs)]
    assert len(batches[0]) == 3
    for own, expected in zip(*batches):
        assert own.keys() == expected.keys()
        assert own["impath"] == expected["impath"]
        assert torch.equal(own["camid"], expected["camid"])
        assert own["img"].shape == expected["img"].shape
        levels = 255 * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1) * (own["img"] - expected["img"]).abs()
        assert levels.mean() <= 0.1
        assert levels.max() <= 2.01


def make_tracklets(root: Path, **options: Any) -> Any:
    """A data manager of tracklets of three frames, of 4 identities to train on."""
    torchreid_snloss.register()
    make_pedestrians(root / SyntheticTracklets.dataset_dir, num_train_pids=4, num_test_pids=2, frames=3)
    sizes = {"height": 64, "width": 32, "batch_size_train": 2, "batch_size_test": 2}
    return data.VideoDataManager(
        root=str(root), sources="synthetic_video", use_gpu=False, workers=0, **{**sizes, "seq_len": 3, **options}
    )


def test_a_tracklet_is_torchreids_and_frames_may_have_several_sizes(tmp_path: Path) -> None:
    theirs = make_tracklets(tmp_path, batch_size_train=4, seq_len=2, sample_method="random")
    frame = sorted(tmp_path.rglob("query/*.jpg"))[1]
    Image.open(frame).resize((70, 50)).save(frame)
    ours = with_batch_transforms(theirs)
    train = ours.train_loader
    for loader in (theirs, ours):
        for split in loader.test_loader["synthetic_video"].values():
            getattr(split.dataset, "dataset", split.dataset).sample_method = "evenly"
    own, expected = (next(iter(x.test_loader["synthetic_video"]["query"]))["img"] for x in (ours, theirs))
    assert own.shape == (2, 2, 3, 64, 32)
    torch.testing.assert_close(own, expected, rtol=0, atol=4 / 255 / 0.22)

    # Frames drawn at random follow from seed and epoch too, and change no other random number.
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, other = train.dataset.__getitems__([0, 0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    again = train.dataset[0]
    np.testing.assert_array_equal(first[DECODED]["images"], again[DECODED]["images"])
    drawn = {tuple(image.sum() for image in train.dataset[0][DECODED]["images"])}
    for epoch in range(1, 9):
        train.dataset.start_epoch(1, epoch)
        drawn.add(tuple(image.sum() for image in train.dataset[0][DECODED]["images"]))
    assert len(drawn) == 3  # of three frames two
    assert other[DECODED]["copy"] == 1


def test_frames_at_random_are_the_same_in_every_test(tmp_path: Path) -> None:
    ours = with_batch_transforms(make_tracklets(tmp_path, seq_len=1, sample_method="random"))
    gallery = ours.test_loader["synthetic_video"]["gallery"]
    first, *others = (torch.cat([batch["img"] for batch in gallery]) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
    gallery.trains = True  # each pass draws others then
    assert not all(torch.equal(first, torch.cat([batch["img"] for batch in gallery])) for _ in range(5))


# ---- the same distributions ----


def both(step: Any, image: Tensor, measure: Callable[[Tensor], Any], count: int = 800) -> tuple[Any, Any]:
    """What is measured of an image after torchreid's transform and after ours; each (count, values)."""
    random.seed(3)
    torch.manual_seed(3)
    floats = image.is_floating_point()
    to_tensor = transforms.PILToTensor()
    theirs = []
    for _ in range(count):
        given = image.clone() if floats else transforms.functional.to_pil_image(image)
        done = step(given)
        theirs.append(measure(done if floats else to_tensor(done)))
    before = [transforms.Resize(SIZE), *[transforms.ToTensor()] * floats]
    _, _, (*_, ours) = batched(transforms.Compose([*before, step]))
    done = ours(image.expand(count, -1, -1, -1).clone(), Draws(image_keys(3, 0, np.arange(count))))
    assert done.dtype == image.dtype
    return np.array(theirs, float), np.array([measure(one) for one in done], float)


def alike(theirs: Any, ours: Any) -> None:
    """Each measured value has the same distribution, by the test of Kolmogorov and Smirnov, and by its spread."""
    for column in range(theirs.shape[1]):
        assert stats.ks_2samp(theirs[:, column], ours[:, column]).pvalue > 0.005, column
        assert theirs[:, column].std() == pytest.approx(ours[:, column].std(), rel=0.15, abs=1e-9)


def test_flips_and_crops_as_often_and_as_far_as_torchreid() -> None:
    left = torch.zeros(3, *SIZE, dtype=torch.uint8)
    left[:, :, :5] = 255
    theirs, ours = both(transforms.RandomHorizontalFlip(), left, lambda one: [one[0, 0, 0] == 0])
    alike(theirs, ours)
    assert ours.mean() == pytest.approx(0.5, abs=0.05)

    # Red says how far from the top a pixel was, green how far from the left.
    height, width = SIZE
    where = torch.zeros(3, *SIZE, dtype=torch.uint8)
    where[0], where[1] = torch.arange(height).view(-1, 1) * 4, torch.arange(width) * 8
    step = data.transforms.Random2DTranslation(*SIZE)

    def offset(one: Tensor) -> list[float]:
        return [one[0, 30, 16].item(), one[1, 30, 16].item(), one[0, -1, 0].item() - one[0, 0, 0].item()]

    alike(*both(step, where, lambda one: [offset(one)[2] < 4 * (height - 1)]))  # how many are cropped
    step.p = 1
    theirs, ours = both(step, where, offset)
    alike(theirs, ours)
    known = {tuple(row) for row in theirs}  # the same pixels for the same draws, but for the rarest corners
    assert np.mean([tuple(row) in known for row in ours]) > 0.95
    assert len(np.unique(ours, axis=0)) > 30


def test_erases_as_often_as_large_and_where_torchreid_does() -> None:
    step = data.transforms.RandomErasing(mean=[5.0, 6.0, 7.0])

    def box(one: Tensor) -> list[float]:
        rows, columns = (one[0] == 5).any(dim=1).nonzero(), (one[0] == 5).any(dim=0).nonzero()
        if len(rows) == 0:
            return [0, 0, 0, 0, 0, 0]
        assert one[:, rows[0], columns[0]].flatten().tolist() == [5, 6, 7]
        height, width = (int(ends[-1] - ends[0]) + 1 for ends in (rows, columns))
        assert (one[0] == 5).sum() == height * width
        return [1, height * width, height / width, int(rows[0]), int(columns[0]), height]

    alike(*both(step, torch.zeros(3, *SIZE), box))


def test_jitters_as_strongly_as_torchreid() -> None:
    halves = torch.full((3, *SIZE), 60, dtype=torch.uint8)
    halves[:, :, :20] = 200

    def levels(one: Tensor) -> list[float]:
        return [one[0, 0, 0].item(), one[0, 0, -1].item(), one[1, 0, 0].item() - one[1, 0, -1].item()]

    theirs, ours = both(transforms.ColorJitter(brightness=0.2, contrast=0.15), halves, levels, count=500)
    alike(theirs, ours)


def test_jitter_rounds_as_pillow() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *SIZE), dtype=np.uint8))
    pillow = transforms.functional.to_pil_image(image)
    functions = {
        "brightness": (1.13, transforms.functional.adjust_brightness),
        "contrast": (0.91, transforms.functional.adjust_contrast),
    }
    for name, (factor, function) in functions.items():
        given = transforms.ColorJitter(**{name: (factor, factor)})
        _, _, (ours,) = batched(transforms.Compose([transforms.Resize(SIZE), given]))
        own = ours(image[None].clone(), Draws(image_keys([0])))[0]
        expected = transforms.PILToTensor()(function(pillow, factor))
        assert (own.int() - expected.int()).abs().max() <= 1, name
        assert (own != expected).float().mean() < 0.01, name


def test_patches_as_often_and_as_large_as_torchreid() -> None:
    torchreid_snloss.register()
    rng, count = np.random.default_rng(0), 800
    images = torch.from_numpy(rng.integers(1, 256, (count, 3, *SIZE), dtype=np.uint8))
    step = data.transforms.RandomPatch(min_sample_size=10)
    random.seed(3)
    theirs = [transforms.PILToTensor()(step(transforms.functional.to_pil_image(image))) for image in images]
    _, _, (ours,) = batched(
        transforms.Compose([transforms.Resize(SIZE), data.transforms.RandomPatch(min_sample_size=10)])
    )
    draws = image_keys(3, 0, np.arange(count))
    own = torch.cat([ours(images[at : at + 64].clone(), Draws(draws[at : at + 64])) for at in range(0, count, 64)])

    def box(before: Tensor, after: Tensor) -> list[float]:
        changed = (before != after).any(dim=0)
        if not changed.any():
            return [0, 0, 0, 0, 0]
        (rows,), (columns,) = changed.any(dim=1).nonzero(as_tuple=True), changed.any(dim=0).nonzero(as_tuple=True)
        black = ((after == 0).all(dim=0)).sum()
        return [1, len(rows) * len(columns), int(rows[0]), int(columns[0]), int(black)]

    measured = [np.array([box(*pair) for pair in zip(images, after)], float) for after in (theirs, own)]
    alike(*measured)
    assert torch.equal(own[:9], images[:9])  # as there are not ten patches yet


@pytest.mark.parametrize("degrees", [-10, -3, 1, 7, 10])
def test_rotates_as_pillow(degrees: int) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (3, 41, 20), dtype=np.uint8))
    expected = transforms.PILToTensor()(transforms.functional.to_pil_image(image).rotate(degrees))
    assert (_rotated(image, degrees) == expected).float().mean() > 0.98


# ---- random numbers ----


def test_draws_are_uniform_and_independent() -> None:
    keys = image_keys(1, 2, np.arange(4000))
    draws = {name: Draws(keys).of(name).uniform(times=3) for name in ("flip", "crop")}
    columns = [column for drawn in draws.values() for column in drawn.T]
    columns += [Draws(image_keys(*parts, np.arange(4000))).of("flip").uniform()[:, 0] for parts in ((2, 1), (1, 3))]
    for column in columns:
        assert stats.kstest(column, "uniform").pvalue > 0.001
    correlations = np.corrcoef([*columns, np.roll(columns[0], 1)]) - np.eye(len(columns) + 1)
    assert np.abs(correlations).max() < 0.06
    numbers = Draws(keys).integers(-1, 1)
    assert np.bincount(numbers + 1).tolist() == pytest.approx([4000 / 3] * 3, rel=0.08)


class Drops(Tiny):
    """A model with dropout, which asks to stop in a step."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.stop_at = stop_at

    def forward(self, x: Any) -> Any:
        self.stop_at -= 1
        if self.stop_at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(torch.nn.functional.dropout(x, 0.1, self.training))


def test_neither_workers_nor_a_stop_in_an_epoch_change_anything(reid_data: Path, tmp_path: Path) -> None:
    def build(workers: int, stop_at: int = 0) -> Any:
        # The sampler draws from torch's generator, as dropout does.
        manager = make_datamanager(reid_data, transforms=ALL, workers=workers, train_sampler="RandomSampler")
        next(step for step in manager.transform_tr.transforms if hasattr(step, "patchpool")).min_sample_size = 8
        use_batch_transforms(manager, seed=0, use_gpu=False)
        utils.set_random_seed(1)
        return make_engine(ImageSNEngine, manager, Drops(stop_at))

    whole = build(workers=1)
    seen = []
    step = whole.step
    whole.step = lambda batch: (seen.append(batch["img"].clone()), step(batch))[1]
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=3)
    epochs = [torch.cat(seen[at : at + 3]).sum() for at in (0, 3, 6)]
    assert len(set(map(float, epochs))) == 3

    stopped = build(workers=0, stop_at=5)
    with pytest.raises(Stopped, match=r"model\.pth\.tar-1\.2"):
        stopped.run(save_dir=str(tmp_path / "stopped"), max_epoch=3)
    resumed = build(workers=0)
    cache_images([resumed.train_loader], threads=1)
    start = resumed.resume(tmp_path / "stopped/model/model.pth.tar-1.2")
    resumed.run(save_dir=str(tmp_path / "stopped"), max_epoch=3, start_epoch=start)
    for value, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(value, other)


def test_workers_live_through_all_epochs(reid_data: Path) -> None:
    loader = with_batch_transforms(make_datamanager(reid_data, workers=1)).train_loader
    processes, batches = set(), []
    for _ in range(2):
        running = iter(loader)
        processes |= {worker.pid for worker in running._workers}
        batches.append([batch["img"] for batch in running])
    assert len(processes) == 1
    assert not torch.equal(batches[0][0], batches[1][0])  # without `start_epoch`, each pass is an epoch


@pytest.mark.parametrize("fails", ["", "in a step", "after a step", "in a worker"])
def test_workers_end_with_the_run(fails: str, reid_data: Path, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())  # those of other tests
    shutil.copytree(reid_data, tmp_path / "data")
    manager = with_batch_transforms(make_datamanager(tmp_path / "data", workers=2))
    training = make_engine(ImageSNEngine, manager)
    alive = set()

    def fail(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any) -> Any:
            alive.update(multiprocessing.active_children())
            if fails == what:
                raise RuntimeError("here")
            return function(*arguments)

        return failing

    training.forward_backward = fail("in a step", training.forward_backward)
    training.train_loader._after_step = fail("after a step", training.train_loader._after_step)
    if fails == "in a worker":
        for image in (tmp_path / "data").rglob("bounding_box_train/*.jpg"):
            image.write_bytes(b"no image")
    try:
        training.run(save_dir=str(tmp_path), max_epoch=2)
        assert not fails
    except (RuntimeError, UnreadableImageError):
        assert fails
        assert not set(multiprocessing.active_children()) - before  # while the traceback lives
    assert len(alive - before) == (0 if fails == "in a worker" else 2)
    assert not set(multiprocessing.active_children()) - before


def test_a_transform_that_is_there_twice_draws_twice() -> None:
    flips = [transforms.RandomHorizontalFlip() for _ in range(2)]
    _, resize, steps = batched(transforms.Compose([transforms.Resize(SIZE), *flips]))
    images = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(200, 64, 32, 3).contiguous()
    decoded = {"pixels": images.flatten(), "sizes": np.array([SIZE] * 200), "shape": (200,)}
    decoded |= {"index": np.arange(200), "copy": np.zeros(200, int)}
    transformed = BatchTransforms(resize, steps, use_gpu=False)({DECODED: decoded}, 1, 0)["img"]
    mirrored = (transformed != _planar(images)).flatten(1).any(dim=1).sum()
    assert 70 < mirrored < 130


def test_copies_of_an_image_in_a_batch_differ(reid_data: Path) -> None:
    loader = with_batch_transforms(make_datamanager(reid_data, transforms=["random_crop"])).train_loader
    batch = loader.transforms(loader.collate_fn(loader.dataset.__getitems__([3] * 16)), 1, 0)
    assert len({float(one.sum()) for one in batch["img"]}) > 4


# ---- the command line ----

SHORT = ["train.max_epoch", 1, "loss.name", "sn", "data.batch_transforms", True]


def test_a_run_with_a_cache_is_the_same(train: Callable[..., Done], in_folder: Path) -> None:
    options = [*SHORT, "data.transforms", str(ALL), "data.val_fraction", 0.25, "data.save_dir"]
    done = train(*options, "cached", "data.cache", "ram")
    assert done.code == 0, done.err
    assert "=> data.cache ram: 184 decoded images take 4.3 MiB of shared memory; " in done.out
    assert train(*options, "decoded").code == 0
    weights = [
        torch.load(in_folder / name / "model/model.pth.tar-1", weights_only=True)["state_dict"]
        for name in ("cached", "decoded")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("cache", ["off", "ram"])
def test_an_unreadable_image_is_named(cache: str, reid_data: Path, in_folder: Path, train: Callable[..., Done]) -> None:
    root = in_folder / "broken"
    shutil.copytree(reid_data, root)
    image = sorted(root.rglob("query/*.jpg"))[5]
    image.write_bytes(image.read_bytes()[:300])
    done = train("data.root", root, "test.evaluate", True, "data.batch_transforms", True, "data.cache", cache)
    assert done.code == 1
    assert f"can't read the image '{image}'" in done.err.strip().splitlines()[-1]


def test_a_cache_without_room_is_refused(train: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreid_snloss.data.cache.available_memory", lambda: 100_000)
    done = train(*SHORT, "data.cache", "ram")
    assert done.code == 2
    assert "data.cache ram needs 4.3 MiB for 184 decoded images, but only 0.1 MiB of memory are available" in done.err


def test_no_image_is_decoded_before_all_is_checked(train: Callable[..., Done]) -> None:
    done = train(*SHORT, "data.cache", "ram", "test.ranks", [999])
    assert done.code == 2
    assert "decod" not in done.out


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step", {"job": ("3000000", "1000000"), "job/step": ("max", "900000")}, 2_000_500),
        ("0::/elsewhere", {"": ("700000", "100000")}, 600_500),
        ("4:cpu,memory:/job", {"memory/job": ("900000", "100000"), "memory": ("9" * 18, "5")}, 800_500),
        ("0::/", {}, 9_000_000 * 1024),
    ],
)
def test_a_limit_of_any_control_group_counts(
    groups: str, limits: dict[str, tuple[str, str]], expected: int, tmp_path: Path
) -> None:
    version_1 = "memory" in groups
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\nMemAvailable: 9000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"12:cpuset:/\n{groups}\n")
    for group, values in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, values):
            (folder / name).write_text(value)
        (folder / "memory.stat").write_text("anon 7\ninactive_file 500\n")
    assert available_memory(tmp_path) == expected


def test_a_cache_is_shared_by_its_address_and_holds_the_pixels(files: list[Path]) -> None:
    cache = ImageCache.filled([*map(str, files), str(files[0])], threads=2)
    other = ImageCache(*cache.address)
    for file in files:
        image = other.get(str(file))
        assert image is not None
        np.testing.assert_array_equal(image, decode_array(str(file)))
    assert other.get("elsewhere.jpg") is None
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0
    with pytest.raises(CacheError, match="can't map the memory of process"):
        ImageCache(cache.address[0], os.getpid(), 999_999)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX's pipes")
def test_a_cache_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    pipe, raised = str(tmp_path / "pipe.jpg"), []
    os.mkfifo(pipe)

    def fill() -> None:
        try:
            ImageCache.filled([pipe], threads=1)
        except UnreadableImageError as error:
            raised.append(str(error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    thread.join(10)
    assert raised == [f"can't read the image {pipe!r}: it is not a regular file"]


class Solarize:
    """A transform that torchreid does not have."""

    def __call__(self, image: Any) -> Any:
        return image.point(lambda value: value if value < 128 else 255 - value)

    def __repr__(self) -> str:
        return "Solarize()"


def test_a_transform_of_ones_own_is_done_first_or_refused(reid_data: Path) -> None:
    theirs = make_datamanager(reid_data, transforms=[], train_sampler="RandomSampler")
    steps = theirs.train_loader.dataset.transform.transforms
    steps.insert(0, Solarize())
    own = with_batch_transforms(theirs).train_loader
    expected = torch.stack([theirs.train_loader.dataset[number]["img"] for number in range(4)])
    batch = own.transforms(own.collate_fn([own.dataset[number] for number in range(4)]), 1, 0)
    torch.testing.assert_close(batch["img"], expected, rtol=0, atol=4 / 255 / 0.22)

    steps.append(steps.pop(0))
    with pytest.raises(ValueError, match=r"the transform Solarize\(\) has no batch transform"):
        with_batch_transforms(theirs)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([transforms.Resize(SIZE), transforms.ColorJitter(hue=0.1)], "changes saturation or hue"),
        ([transforms.Resize(64)], "must resize bilinearly, to a height and a width"),
        ([transforms.ToTensor()], r"needs a Resize of torchvision's to a height and a width, got \[ToTensor\(\)\]"),
        ([transforms.RandomResizedCrop(SIZE)], r"got \[RandomResizedCrop\("),
        (
            [transforms.Resize(SIZE), data.transforms.Random2DTranslation(*SIZE, interpolation=Image.NEAREST)],
            "Random2DTranslation must resize bilinearly",
        ),
        (
            [transforms.Resize(SIZE), data.transforms.Random2DTranslation(48, 24)],
            r"Random2DTranslation to \(48, 24\) \(height, width\) has no batch transform for images of \(64, 32\)",
        ),
        *(
            (
                [transforms.Resize(SIZE), transforms.ToTensor(), step],
                f"{type(step).__name__} has no batch transform after ToTensor; use False",
            )
            for step in (
                transforms.ColorJitter(0.2),
                transforms.ToTensor(),
                data.transforms.RandomPatch(),
                data.transforms.Random2DTranslation(*SIZE),
            )
        ),
        *(
            (
                [transforms.Resize(SIZE), step, transforms.ToTensor()],
                f"{type(step).__name__} has no batch transform before ToTensor; use False",
            )
            for step in (transforms.Normalize([0.5] * 3, [0.5] * 3), data.transforms.RandomErasing())
        ),
    ],
)
def test_a_step_without_a_batch_transform_is_named(steps: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"data.batch_transforms.*{message}"):
        batched(transforms.Compose([transforms.Compose(steps)]))


@pytest.mark.parametrize("first", [transforms.ToTensor(), transforms.Grayscale(1)])
def test_what_comes_before_the_resizing_must_give_rgb_images(first: Any, reid_data: Path) -> None:
    theirs = make_datamanager(reid_data, transforms=[])
    theirs.train_loader.dataset.transform.transforms.insert(0, first)
    with pytest.raises(UnreadableImageError, match=r"resizes RGB images of uint8.* that \[.*\] give are"):
        next(iter(with_batch_transforms(theirs).train_loader))


def test_loaders_keep_their_options_or_are_refused(reid_data: Path) -> None:
    theirs = make_datamanager(reid_data)
    given = theirs.train_loader
    options = {"num_workers": 1, "worker_init_fn": id, "timeout": 7, "prefetch_factor": 3}
    theirs.train_loader = DataLoader(given.dataset, batch_size=8, multiprocessing_context="spawn", **options)
    own = with_batch_transforms(theirs)
    assert {name: getattr(own.train_loader, name) for name in options} == options
    assert own.train_loader.multiprocessing_context.get_start_method() == "spawn"
    with pytest.raises(ValueError, match="has batch transforms already"):
        with_batch_transforms(own)
    theirs.train_loader = DataLoader(given.dataset, collate_fn=list)
    with pytest.raises(ValueError, match="needs loaders as torchreid makes them, but one has the collate_fn"):
        with_batch_transforms(theirs)
    theirs.train_loader = DataLoader(given.dataset, batch_sampler=[[0, 1]])
    with pytest.raises(ValueError, match="but one has a batch_sampler"):
        with_batch_transforms(theirs)


def test_a_patch_is_pasted_however_many_there_must_be(reid_data: Path) -> None:
    step = data.transforms.RandomPatch(min_sample_size=1100, prob_happen=1.0)
    _, _, (ours,) = batched(transforms.Compose([transforms.Resize(SIZE), step]))
    images = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (1300, 3, *SIZE), dtype=np.uint8))
    changed = (ours(images.clone(), Draws(image_keys(np.arange(1300)))) != images).flatten(1).any(dim=1)
    assert not changed[:1000].any()
    assert changed[1200:].float().mean() > 0.9


# ---- data sets of one's own ----


def _cropped(image: Any) -> Any:
    width, height = image.size
    return image.crop((2, 2, width - 2, height - 2))


def own_items(datamanager: Any, get_item: Callable[[Any, int], Any]) -> Any:
    """Gives the training set a `__getitem__` of its own."""
    dataset = datamanager.train_loader.dataset
    dataset.__class__ = type("Own", (type(dataset),), {"__getitem__": get_item})
    return datamanager


@pytest.mark.parametrize("change", [_cropped, transforms.functional.hflip, lambda image: image.rotate(180)])
def test_a_data_set_may_change_the_images_that_it_reads(change: Callable[[Any], Any], reid_data: Path) -> None:
    def get_item(self: Any, number: int) -> Any:
        path, pid, camid, _ = self.data[number]
        image = change(data.datasets.dataset.read_image(path))
        return {"img": self.transform(image), "pid": pid, "camid": camid, "impath": path, "index": number, "sizes": 7}

    theirs = own_items(make_datamanager(reid_data, transforms=[]), get_item)
    numbers = [5, 0, 9]
    expected = default_collate([theirs.train_loader.dataset[number] for number in numbers])
    loader = with_batch_transforms(theirs).train_loader
    batch = loader.transforms(loader.collate_fn(loader.dataset.__getitems__(numbers)), 1, 0)
    torch.testing.assert_close(batch.pop("img"), expected.pop("img"), rtol=0, atol=2.01 / 255 / 0.22)
    assert batch.keys() == expected.keys()
    assert batch["index"].tolist() == numbers


@pytest.mark.parametrize("change", ["mirrors it", "scales it", "two views", "none"])
def test_a_data_set_that_changes_what_its_transform_gives_is_refused(change: str, reid_data: Path) -> None:
    def get_item(self: Any, number: int) -> Any:
        path, pid, camid, _ = self.data[number]
        image = data.datasets.dataset.read_image(path)
        img = transforms.ToTensor()(image) if change == "none" else self.transform(image)
        if change == "two views":
            self.transform(image)
        img = img.flip(-1) if change == "mirrors it" else img * 0.5 if change == "scales it" else img
        return {"img": img, "pid": pid, "camid": camid, "impath": path}

    loader = with_batch_transforms(own_items(make_datamanager(reid_data), get_item)).train_loader
    with pytest.raises(
        UnreadableImageError, match="calls its transform once for each image, and returns the results as"
    ):
        next(iter(loader))


def test_tracklets_of_ones_own_keep_their_frames(tmp_path: Path) -> None:
    theirs = make_tracklets(tmp_path, transforms=[])

    def get_item(self: Any, number: int, backwards: bool = False) -> Any:
        paths, pid, camid, _ = self.data[number]
        frames = [self.transform(_cropped(data.datasets.dataset.read_image(path))) for path in paths]
        return {"img": torch.stack(frames[::-1] if backwards else frames), "pid": pid, "camid": camid}

    expected = own_items(theirs, get_item).train_loader.dataset[1]["img"]
    loader = with_batch_transforms(theirs).train_loader
    batch = loader.transforms(loader.collate_fn([loader.dataset[1]]), 1, 0)
    torch.testing.assert_close(batch["img"][0], expected, rtol=0, atol=2.01 / 255 / 0.22)
    with pytest.raises(UnreadableImageError, match="returns the results as they are"):
        with_batch_transforms(
            own_items(theirs, functools.partialmethod(get_item, backwards=True))
        ).train_loader.dataset[1]


def test_an_item_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    loader = with_batch_transforms(make_tracklets(tmp_path)).train_loader
    broken = Path(loader.dataset.data[0][0][-1])
    broken.write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=broken.name):
        loader.dataset[0]
    assert len(loader.dataset[1][DECODED]["images"]) == 3


# ---- large images ----


def test_large_images_are_resized_where_they_are_decoded(reid_data: Path, tmp_path: Path) -> None:
    theirs = make_datamanager(reid_data, transforms=[])
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 4, 3), dtype=np.uint8))
    for name, size in {"large.jpg": (301, 500), "just.jpg": (64, 128)}.items():
        smooth.resize(size).save(tmp_path / name)
    dataset = theirs.train_loader.dataset
    dataset.data = [(str(tmp_path / name), 0, 0, 0) for name in ("large.jpg", "just.jpg")]
    expected = torch.stack([dataset[number]["img"] for number in (0, 1)])
    loader = with_batch_transforms(theirs).train_loader
    items = loader.dataset.__getitems__([0, 1])
    assert [item[DECODED]["images"][0].shape for item in items] == [(*SIZE, 3), (128, 64, 3)]
    batch = loader.transforms(loader.collate_fn(items), 1, 0)
    assert torch.equal(batch["img"][0], expected[0])
    torch.testing.assert_close(batch["img"], expected, rtol=0, atol=2.01 / 255 / 0.22)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lies.jpg"
    Image.new("RGB", (64, 128)).save(file)
    content = bytearray(file.read_bytes())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = (30_000).to_bytes(2, "big") * 2
    file.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"lies\.jpg.*DecompressionBombError"):
        decode_array(str(file))


def test_softmax_in_torchreids_engine_trains_on_batch_transforms(train: Callable[..., Done]) -> None:
    done = train(*SHORT, "loss.name", "softmax", "data.transforms", str(ALL))
    assert done.code == 0, done.err


def test_all_is_done_on_the_device_of_the_batch(reid_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch refuses to mix the meta device, which computes nothing, with another, as it refuses to mix GPU and CPU.
    manager = make_datamanager(reid_data, transforms=ALL)
    next(step for step in manager.transform_tr.transforms if hasattr(step, "patchpool")).min_sample_size = 1
    loader = with_batch_transforms(manager).train_loader
    monkeypatch.setattr("torchreid_snloss.device.to_device", lambda value, use_gpu: value.to("meta"))
    items = loader.dataset.__getitems__(range(16))
    items[0][DECODED]["images"] = [np.zeros((50, 40, 3), np.uint8)]
    images = loader.transforms(loader.collate_fn(items), 1, 0)["img"]
    assert images.device.type == "meta"
    assert images.shape == (16, 3, *SIZE)


def test_kept_features_are_read_again_without_a_config(
    reid_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        training = make_engine(ImageSNEngine, with_batch_transforms(make_datamanager(reid_data)))
        training.options.features = str(tmp_path / "features.npz")
        training.run(save_dir=str(tmp_path), test_only=True)
        monkeypatch.setattr("torchreid_snloss.engine.testing.extract", None)  # no image is needed any more
