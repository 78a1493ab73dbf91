"""Data sets that TensorFlow Datasets prepared as ArrayRecord files, read without TensorFlow."""

import os
from typing import Any

from vitjax.errors import InputError, UnreadableImage, suggest


def _import() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError("TFDS data sets need: pip install 'vitjax[tfds]'") from error
    return tensorflow_datasets


class TFDS:
    """One split of a prepared data set; images stay encoded, as they are in its files.

    Args:
      name: as TFDS spells it: `name`, `name/config` or `name/config:version`; "" if data_dir is
        the folder of one version itself, which holds dataset_info.json.
      split: also a part of one, as in `train[:90%]`.
      data_dir: the folder of all data sets; TFDS's own by default.
      image, label: names of the features.
      multi_label: the label is a sequence.
    """

    def __init__(
        self,
        name: str = "",
        split: str = "train",
        data_dir: str | None = None,
        image: str = "image",
        label: str = "label",
        multi_label: bool = False,
    ):
        tfds = _import()
        builder = _open(tfds, name, data_dir)
        features = builder.info.features
        for feature in (image, label):
            if feature not in features:
                raise InputError(
                    f"{builder.info.name} has no feature {feature!r}; "
                    f"{suggest(feature, sorted(features))}"
                )
        decoders = {image: tfds.decode.SkipDecoding()}
        try:
            self._records: Any = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(
                f"{builder.data_path} is stored as {builder.info.file_format.value}, which has no "
                f"random access: {_how_to_prepare(builder.info.name, data_dir)}"
            ) from error
        except (ValueError, KeyError) as error:
            raise InputError(
                f"unknown split {split!r} of {builder.info.name}; "
                f"{suggest(split, list(builder.info.splits))}"
            ) from error
        self._name = f"{builder.info.full_name}/{split}"
        self._image, self._label, self._multi = image, label, multi_label
        classes = getattr(features[label], "feature", features[label])
        is_list = classes is not features[label]
        if is_list != multi_label:
            raise InputError(
                f"the label of {builder.info.name} is {features[label]}: multi_label must be "
                f"{is_list}"
            )
        if not getattr(classes, "num_classes", None):
            raise InputError(f"feature {label!r} of {builder.info.name} is no class label")
        self.num_classes: int = classes.num_classes
        self.class_names: tuple[str, ...] | None = tuple(classes.names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, OSError) as error:
            raise UnreadableImage(f"damaged record: {error}") from error
        labels = record[self._label]
        return {
            "image": record[self._image],
            "label": [int(v) for v in labels] if self._multi else int(labels),
            "id": f"{self._name}[{index}]",
        }


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    folder = f" --data_dir={data_dir}" if data_dir else ""
    return (
        "prepare it once, where TensorFlow is installed, with "
        f"`tfds build {name or 'NAME'} --file_format=array_record{folder}`"
    )


def _open(tfds: Any, name: str, data_dir: str | None) -> Any:
    """The data set as its files describe it, whether or not its code is at hand."""
    from tensorflow_datasets.core import read_only_builder

    if data_dir and os.path.isfile(os.path.join(data_dir, "dataset_info.json")):
        return tfds.builder_from_directory(data_dir)
    if not name:
        raise InputError(
            f"no dataset_info.json in {data_dir or '(data_dir is not set)'}: give the name of the "
            "data set, or as data_dir the folder of one version of it"
        )
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"{name!r} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}: "
            f"{_how_to_prepare(name, data_dir)}"
        ) from error
