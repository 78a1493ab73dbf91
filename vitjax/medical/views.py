"""Test-time augmentation: the mean probability of several views of each test image."""

from collections.abc import Sequence

import numpy as np

from vitjax.data.policies import Policy
from vitjax.medical.scoring import Scored, probabilities, to_units
from vitjax.medical.transfer import Outcome, Transfer


def scored(
    transfer: Transfer, outcomes: Sequence[Outcome], policy: str, number: int
) -> list[Scored] | None:
    """The test units of each outcome, with means over views; None where there is no model.

    The views are the image as it is and draws of the policy that the model was trained with, so
    that nothing is shown that the policy forbids: no mirrored chest.

    Args:
      number: of views.
    """
    cohort, rows = transfer.cohort, transfer.rows["test"]
    found = []
    for outcome in outcomes:
        model = transfer.fitted(outcome)
        if model is None:
            return None
        logits = transfer.outputs(model, rows, augment=Policy(policy), num_views=number)["logits"]
        each = [probabilities(cohort.label_sets, logits[:, view]) for view in range(number)]
        means = {name: np.mean([p[name] for p in each], 0) for name in each[0]}
        found.append(to_units(cohort, rows, means))
    return found
