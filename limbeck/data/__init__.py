"""Where samples come from: sources, loaders, and augmentations that can be replayed.

``load_source`` describes data by its splits, ``build_loader`` makes batches of one, ``as_loader`` takes what a user
has.
"""

from limbeck.data.augment import TRANSFORMS, Augment, AugmentSpec, describe_augment, parse_augment, views
from limbeck.data.build import as_loader, build_loader
from limbeck.data.collate import part_of, to_batch
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.data.mixing import Cutmix, Mixing, Mixup
from limbeck.data.normalise import NORMALISATIONS, Normalisation, normalisation
from limbeck.data.order import epoch_order, hold_out
from limbeck.data.resident import ResidentLoader
from limbeck.data.shape_model import ShapeModel
from limbeck.data.sources.digits import digits
from limbeck.data.sources.folder import image_folder
from limbeck.data.sources.hub import hub
from limbeck.data.sources.load import as_split, load_source, tensors
from limbeck.data.sources.parquet import parquet
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import DatasetSplit, ImageSplit, Split, StreamSplit, TensorSplit
from limbeck.data.stream import StreamLoader
from limbeck.data.tasks import TASKS, Task
from limbeck.data.tokenizer import Tokenizer
from limbeck.data.transforms import Cutout, Flip, Geometric, Masking, PadCrop, Transform
from limbeck.data.wrapped import WrappedLoader

__all__ = [
    "NORMALISATIONS",
    "TASKS",
    "TRANSFORMS",
    "Augment",
    "AugmentSpec",
    "Cutmix",
    "Cutout",
    "DataSource",
    "DatasetSplit",
    "Flip",
    "Geometric",
    "ImageSplit",
    "IndexedLoader",
    "Loader",
    "Masking",
    "Mixing",
    "Mixup",
    "Normalisation",
    "PadCrop",
    "ResidentLoader",
    "ShapeModel",
    "Split",
    "StreamLoader",
    "StreamSplit",
    "Task",
    "TensorSplit",
    "Tokenizer",
    "Transform",
    "WrappedLoader",
    "as_loader",
    "as_split",
    "build_loader",
    "describe_augment",
    "digits",
    "epoch_order",
    "hold_out",
    "hub",
    "image_folder",
    "load_source",
    "normalisation",
    "parquet",
    "parse_augment",
    "part_of",
    "tensors",
    "to_batch",
    "views",
]
