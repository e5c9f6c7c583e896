"""Data: the identity sampler, synthetic data sets, folders of images, the training set, held-out identities, paths."""

from torchreid_snloss.data.batches import use_batch_transforms
from torchreid_snloss.data.folder import FolderOptions, ImageFolder, folder_options
from torchreid_snloss.data.items import check_labels, with_checked_items
from torchreid_snloss.data.left_out import left_out_images
from torchreid_snloss.data.literal_paths import glob_in_folder, replace_functions, search_in_file_name
from torchreid_snloss.data.load_errors import explain
from torchreid_snloss.data.modules import import_modules, unknown_dataset
from torchreid_snloss.data.picture_names import with_distinct_names
from torchreid_snloss.data.readable import UnreadableImageError, name_unreadable_images
from torchreid_snloss.data.sampler import IdentitySampler
from torchreid_snloss.data.synthetic import SyntheticPedestrians, SyntheticTracklets, make_pedestrians
from torchreid_snloss.data.testing import for_test_run, test_run, with_optional_training_folder
from torchreid_snloss.data.training_set import (
    add_label_noise,
    add_outliers,
    keep_fraction,
    set_training_items,
    stable_order,
)
from torchreid_snloss.data.validation import VALIDATION, hold_out
from torchreid_snloss.data.workers import WorkerKilledError, batches_of

__all__ = [
    "VALIDATION",
    "FolderOptions",
    "IdentitySampler",
    "ImageFolder",
    "SyntheticPedestrians",
    "SyntheticTracklets",
    "UnreadableImageError",
    "WorkerKilledError",
    "add_label_noise",
    "add_outliers",
    "batches_of",
    "check_labels",
    "explain",
    "folder_options",
    "for_test_run",
    "glob_in_folder",
    "hold_out",
    "import_modules",
    "keep_fraction",
    "left_out_images",
    "make_pedestrians",
    "name_unreadable_images",
    "replace_functions",
    "search_in_file_name",
    "set_training_items",
    "stable_order",
    "test_run",
    "unknown_dataset",
    "use_batch_transforms",
    "with_checked_items",
    "with_distinct_names",
    "with_optional_training_folder",
]
