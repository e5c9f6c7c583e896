"""The file of `test.features`: a test run leaves the features of its test sets there, and later ones use them."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchreid_snloss import distributed
from torchreid_snloss.checkpoint.atomic import atomic_write
from torchreid_snloss.data.fingerprint import difference, fingerprint, relative_names
from torchreid_snloss.engine.differences import feature_settings
from torchreid_snloss.engine.extraction import SplitFeatures
from torchreid_snloss.engine.options import WriteError
from torchreid_snloss.errors import text_of
from torchreid_snloss.values import shown

__all__ = ["FeaturesError", "FeaturesFile", "conditions", "weights_digest"]

FORMAT_VERSION = 1
_ABOUT = "about"


class FeaturesError(ValueError):
    """A file of features can't be used: it is damaged, or of other images, weights or options than the run's."""


def conditions(
    settings: Mapping[str, Any] | None, loader: Any, flip: bool, pooling_method: str | None = None
) -> dict[str, Any]:
    """What features depend on besides the weights and the images: the values of config keys, by key.

    Args:
        settings: the settings of the run, by key; None for a run without a config, whose image transform counts.
        loader: the loader of a test set.
        flip: whether the features are means over an image and its mirror image.
        pooling_method: how an engine for video pools the features of a tracklet's frames; None for another engine.
    """
    if settings is None:
        frames = {key: getattr(loader.dataset, key, None) for key in ("seq_len", "sample_method")}
        transform = " ".join(str(getattr(loader.dataset, "transform", None)).split())
        return {"test.flip": flip, "transform": transform, "pooling_method": pooling_method, **frames}
    return {"test.flip": flip, **feature_settings(settings)}


def weights_digest(models: Iterable[nn.Module]) -> str:
    """A digest of the weights of models, without those of their classifiers, which no test uses."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in (item for model in models for item in getattr(model, "module", model).state_dict().items()):
        if not name.startswith("classifier") and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FeaturesFile:
    """Reads and writes features of test sets, which are those of one model and of the same options.

    The file is a zip archive that `numpy.load` reads: `about`, a text in JSON, and for each split of a test set its
    `features`, `pids`, `camids` and `paths`, relative to the folder of the images. The features are not normalised yet.
    On several processes rank 0 reads and writes, and all call the methods alike.

    Args:
        path: the file. It need not be there yet.
        weights: the `weights_digest` of the model.
        options: the `conditions` of the run.
        items: the items of each split that the run tests on, by data set and split.

    Raises:
        FeaturesError: if the file is damaged, or of other weights, options or images. What differs is named.
    """

    def __init__(
        self, path: str | Path, weights: str, options: Mapping[str, Any], items: Mapping[tuple[str, str], Sequence[Any]]
    ) -> None:
        self._path = Path(path)
        self._failed = ""
        self._items = {"/".join(key): of_split for key, of_split in items.items()}
        prints = {name: {**fingerprint(of_split), "order": ""} for name, of_split in self._items.items()}
        self._own = json.loads(json.dumps({"weights": weights, "options": options, "splits": prints}))
        self._about: dict[str, Any] = {"splits": {}}
        self._on_rank_0(self._read_about)

    def read(self, dataset: str, split: str, paths: list[str]) -> SplitFeatures | None:
        """Reads the features of a split; None if the file does not have them.

        Args:
            dataset: the name of the data set.
            split: the name of the split.
            paths: the image files of this run, which may lie elsewhere than when the file was written.

        Raises:
            FeaturesError: if the file is damaged.
        """
        name = f"{dataset}/{split}"
        found: list[SplitFeatures] = []
        if distributed.broadcast_object(name in self._about["splits"]):
            self._on_rank_0(lambda: found.append(self._read_split(name, paths)))
            return _broadcast(found[0] if found else None, paths)
        return None

    def write(self, dataset: str, split: str, found: SplitFeatures) -> None:
        """Adds the features of a split to the file. A failure is not raised before `close`."""
        if distributed.rank() > 0 or self._failed:
            return
        name = f"{dataset}/{split}"
        splits = {**self._about["splits"], name: self._own["splits"][name]}
        about = {"format_version": FORMAT_VERSION, **self._own, "splits": splits}
        features = found.features if found.features.dtype == torch.float64 else found.features.float()
        arrays = {"features": features.numpy(), "pids": found.pids, "camids": found.camids}
        arrays["paths"] = self._names(name)
        try:
            atomic_write(self._path, lambda stream: self._write_archive(stream, about, name, arrays))
        except OSError as error:
            self._failed = error.strerror or text_of(error)
        except (zipfile.BadZipFile, zlib.error) as error:  # another split of the file, which is copied
            self._failed = f"what it holds is damaged: {text_of(error, longest=200)}"
        else:
            self._about = about
            print(f'=> The features of {dataset}, {split}, are in "{self._path}"')

    def close(self) -> None:
        """Ends the use of the file.

        Raises:
            WriteError: if features could not be written.
        """
        failed = distributed.broadcast_object(self._failed)
        if failed:
            raise WriteError(
                f"test.features {str(self._path)!r} can't be written: {failed}; the results above are complete"
            )

    def _on_rank_0(self, work: Callable[[], object]) -> None:
        """Calls a function on rank 0. All processes raise the error that it raises."""
        error: FeaturesError | None = None
        if distributed.rank() == 0:
            try:
                work()
            except FeaturesError as raised:
                error = raised
        error = distributed.broadcast_object(error)
        if error is not None:
            raise error

    def _read_about(self) -> None:
        try:
            if not self._path.exists():
                return
            if not self._path.is_file():  # such as a pipe, which nobody may ever write to
                raise FeaturesError(f"can't read test.features {str(self._path)!r}: it is not a regular file")
            with zipfile.ZipFile(self._path) as archive:
                about = json.loads(str(_read_array(archive, _ABOUT)))
            version = about.get("format_version")
            if version is None:
                raise FeaturesError(
                    f"{str(self._path)!r} is no file that a test with test.features has written; perhaps it is one of "
                    "torchreid-snloss-features"
                )
            if version > FORMAT_VERSION:
                raise FeaturesError(
                    f"{str(self._path)!r} was written by a later version of torchreid-snloss, in format {version}; "
                    f"this one reads formats up to {FORMAT_VERSION}"
                )
            differences = self._differences(about)
        except FeaturesError:
            raise
        except Exception as error:  # a damaged file raises nearly any class
            raise self._damaged(error) from error
        if differences:
            raise FeaturesError(
                f"test.features {str(self._path)!r}: {'; '.join(differences)}; name another file in test.features, or "
                "remove this one"
            )
        self._about = about

    def _differences(self, about: Mapping[str, Any]) -> list[str]:
        """What differs between the file and the run, a sentence each."""
        then, now = about["options"], self._own["options"]
        keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
        found = []
        if keys:
            file, run = (", ".join(f"{key} {shown(of.get(key))}" for key in keys) for of in (then, now))
            found.append(f"its features were extracted with {file}, and this run has {run}")
        if about["weights"] != self._own["weights"]:
            found.append("its features are those of other weights")
        for name, own in self._own["splits"].items():
            kept = about["splits"].get(name)
            if kept is not None and kept != own:
                what = difference(kept, own, ("in the file", "in this run"))
                dataset, _, split = name.rpartition("/")
                found.append(f"its {split} images of {dataset} differ: {what}")
        return found

    def _read_split(self, name: str, paths: list[str]) -> SplitFeatures:
        parts = ("features", "pids", "camids", "paths")
        try:
            with zipfile.ZipFile(self._path) as archive:
                features, pids, camids, then = (_read_array(archive, f"{name}/{part}") for part in parts)
            if features.ndim != 2 or features.dtype not in (np.float32, np.float64):
                raise ValueError(f"the features of {name} are not a matrix of floats")
            if not all(x.ndim == 1 and x.dtype.kind == "i" for x in (pids, camids)):
                raise ValueError(f"the identities or cameras of {name} are not lists of integers")
            if not len(features) == len(pids) == len(camids) == len(then) == len(paths):
                raise ValueError(f"the features, identities or cameras of {name} are not those of {len(paths)} images")
            now = self._names(name)
            if not np.array_equal(then, now):  # file systems list files in any order
                rows = np.argsort(then, kind="stable")[np.argsort(np.argsort(now, kind="stable"))]
                if not np.array_equal(then[rows], now):
                    raise ValueError(f"the image files of {name} are others than its fingerprint says")
                features, pids, camids = features[rows], pids[rows], camids[rows]
        except Exception as error:
            raise self._damaged(error) from error
        return SplitFeatures(torch.from_numpy(features), pids, camids, paths)

    def _names(self, name: str) -> NDArray[np.str_]:
        """The image files of a split in this run, or the first one of each tracklet, relative to the data set."""
        return np.array([names[0] for names in relative_names(self._items[name])], dtype=np.str_)

    def _damaged(self, error: Exception) -> FeaturesError:
        if isinstance(error, OSError) and error.strerror:
            return FeaturesError(f"can't read test.features {str(self._path)!r}: {error.strerror}")
        reason = text_of(error, longest=200)
        return FeaturesError(
            f"test.features {str(self._path)!r} is damaged, or not a file of features: {reason}; name another file in "
            "test.features, or remove this one"
        )

    def _write_archive(
        self, stream: IO[bytes], about: Mapping[str, Any], name: str, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        new = {_ABOUT: np.array(json.dumps(about)), **{f"{name}/{part}": array for part, array in arrays.items()}}
        with zipfile.ZipFile(stream, "w") as archive:
            if self._about["splits"]:
                with zipfile.ZipFile(self._path) as before:
                    for member in before.namelist():
                        if member.removesuffix(".npy") not in new:
                            with before.open(member) as old, archive.open(member, "w", force_zip64=True) as copy:
                                shutil.copyfileobj(old, copy, 1 << 20)
            for part, array in new.items():
                with archive.open(f"{part}.npy", "w", force_zip64=True) as target:
                    np.lib.format.write_array(target, array, allow_pickle=False)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive. Its checksum is checked, and nothing is unpickled."""
    with archive.open(f"{name}.npy") as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise ValueError(f"its part {name!r} is longer than its header says")
    return array


def _broadcast(found: SplitFeatures | None, paths: list[str]) -> SplitFeatures:
    """Gives every process what rank 0 has read, and checks it on all of them."""
    kind = found and (found.features.shape, found.features.dtype, found.pids, found.camids)
    shape, dtype, pids, camids = distributed.broadcast_object(kind)  # type: ignore[misc]
    features = torch.empty(shape, dtype=dtype) if found is None else found.features
    distributed.broadcast_tensor(features)
    return SplitFeatures(features, pids, camids, paths)
