"""Sources of examples.

A source is random access: `len(source)` and `source[i] -> {"image", "label", "id"}`, where the
image is encoded bytes or a uint8 or uint16 array and the label an integer, or a list of integers
for multi-label data; "group" may be there too (a patient, a slide). It tells `num_classes`, and
`class_names` where it knows them. It is read from many threads at once, and an example that cannot
be read raises UnreadableImage.

What a source knows without reading images it may tell at once:
  all_labels() -> int64 `[N]`, or a list of integers for each example;
  all_groups() -> a name for each example;
  problems() -> everything found wrong, one sentence each.
The first two may give None.
"""

from typing import Any, Protocol, runtime_checkable

from vitjax.errors import InputError


@runtime_checkable
class Source(Protocol):
    """What the loader needs of a source."""

    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def ask(source: Any, what: str) -> Any:
    """What `source.all_labels()` and its kin tell; None if it has no such method."""
    tell = getattr(source, what, None)
    return None if tell is None else tell()


def choose_classes(found: set[str], where: str) -> tuple[str, ...]:
    """The class names of a folder or an archive, sorted, checked.

    Raises:
      InputError: there is none, or two differ only in case.
    """
    if not found:
        raise InputError(f"no images in class folders found in {where}; expected CLASS/IMAGE.jpg")
    lowered: dict[str, str] = {}
    for name in sorted(found):
        if name.lower() in lowered:
            raise InputError(
                f"classes {lowered[name.lower()]!r} and {name!r} in {where} differ only in case"
            )
        lowered[name.lower()] = name
    return tuple(sorted(found))
