"""ArrayRecord files of tf.train.Example records, as TFDS writes them, without TensorFlow."""

import functools
from collections.abc import Sequence
from typing import Any

from vitjax.data.sources.shards import find_files
from vitjax.errors import InputError, UnreadableImage


@functools.cache
def _example_class() -> Any:
    """The tf.train.Example message: a map from names to lists of bytes, floats or integers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="vitjax_example.proto", package="vitjax", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, parent=file.message_type):
        made = parent.add()
        made.name = name
        return made

    def field(owner, name, number, kind, *, repeated=False, type_name=None, oneof=None):
        made = owner.field.add(name=name, number=number, type=kind)
        made.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        if type_name:
            made.type_name = type_name
        if oneof is not None:
            made.oneof_index = oneof

    lists = {
        "BytesList": kinds.TYPE_BYTES,
        "FloatList": kinds.TYPE_FLOAT,
        "Int64List": kinds.TYPE_INT64,
    }
    for name, kind in lists.items():
        field(message(name), "value", 1, kind, repeated=True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, target) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1
    ):
        field(feature, name, number, kinds.TYPE_MESSAGE, type_name=f".vitjax.{target}", oneof=0)
    features = message("Features")
    entry = message("FeatureEntry", features.nested_type)
    entry.options.map_entry = True
    field(entry, "key", 1, kinds.TYPE_STRING)
    field(entry, "value", 2, kinds.TYPE_MESSAGE, type_name=".vitjax.Feature")
    field(features, "feature", 1, kinds.TYPE_MESSAGE, repeated=True,
          type_name=".vitjax.Features.FeatureEntry")  # fmt: skip
    field(message("Example"), "features", 1, kinds.TYPE_MESSAGE, type_name=".vitjax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vitjax.Example"))


def parse_example(record: bytes) -> dict[str, list]:
    """A serialised tf.train.Example as names and lists of bytes, floats or integers."""
    example = _example_class()()
    example.ParseFromString(record)
    parsed = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        parsed[name] = list(getattr(feature, kind).value) if kind else []
    return parsed


def make_example(values: dict[str, list]) -> bytes:
    """The other way: lists of bytes, floats or integers to a serialised tf.train.Example."""
    example = _example_class()()
    for name, items in values.items():
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(items[0])]
        getattr(example.features.feature[name], kind).value.extend(items)
    return example.SerializeToString(deterministic=True)  # the features in order


class ArrayRecord:
    """Records in ArrayRecord shards.

    Args:
      pattern: a glob of the shards, or several, in the order of their names.
      num_classes: of the whole data set, which a record does not tell.
      image, label: the features that hold the encoded image and the label or labels.
      multi_label: records carry a list of labels.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        num_classes: int,
        image: str = "image",
        label: str = "label",
        multi_label: bool = False,
    ):
        import grain

        paths = find_files(pattern)
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource(paths)
            num_records = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"cannot read {pattern!r} as ArrayRecord files: {error}") from error
        self._image, self._label, self._multi = image, label, multi_label
        self.class_names: tuple[str, ...] | None = None
        self.num_classes = num_classes
        if not num_records:
            raise InputError(f"the files of {pattern!r} hold no records")
        try:
            first = self._record(0)
        except UnreadableImage as error:
            raise InputError(f"cannot read the first record of {pattern!r}: {error}") from error
        for name in (image, label):
            if name not in first:
                raise InputError(
                    f"records of {pattern!r} have no {name!r}; they have {sorted(first)}"
                )

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, index: int) -> dict[str, list]:
        from google.protobuf.message import DecodeError

        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return parse_example(self._records[index])
        except (RuntimeError, ValueError, OSError, DecodeError) as error:
            raise UnreadableImage(f"damaged record: {error}") from error

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        images, labels = record.get(self._image), record.get(self._label, [])
        if not images or not (labels or self._multi):
            raise UnreadableImage(f"the record has no {self._label if images else self._image!r}")
        return {
            "image": images[0],
            "label": [int(v) for v in labels] if self._multi else int(labels[0]),
            "id": f"record {index}",
        }
