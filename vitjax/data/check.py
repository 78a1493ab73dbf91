"""What is wrong with a source, all at once, before a run reads it."""

from vitjax.data.sources import Source, ask
from vitjax.data.sources.labels import label_problems
from vitjax.errors import InputError

LISTED = 20


def check_source(
    source: Source, name: str, num_classes: int | None = None, every_class: bool = True
) -> None:
    """Looks for everything that can be found wrong without decoding an image.

    Args:
      name: what messages call it, such as data.source.
      num_classes: of the model; the source's own by default.
      every_class: whether each class must have an example, as the data of a training run should;
        sources that `may_lack_classes`, such as a subset, need not.

    Raises:
      InputError: there are problems; it lists the first twenty and counts the others.
    """
    problems = list(ask(source, "problems") or [])
    labels = ask(source, "all_labels")
    if labels is not None:
        count = source.num_classes if num_classes is None else num_classes
        every_class = every_class and not getattr(source, "may_lack_classes", False)
        problems += label_problems(labels, count, source.class_names, every_class)
    problems = list(dict.fromkeys(problems))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        more = len(problems) - LISTED
        others = f"\n  ... and {more} more" if more > 0 else ""
        plural = "s" if len(problems) > 1 else ""
        raise InputError(f"{name} has {len(problems)} problem{plural}:{listed}{others}")
