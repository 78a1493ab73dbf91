"""Sources of examples.

A source is random access: `len(source)` and `source[i] -> {"image", "label", "id"}`, where the
image is encoded bytes or a uint8 array and the label an integer, or a list of integers for
multi-label data. It tells `num_classes`, and `class_names` where it knows them.
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
