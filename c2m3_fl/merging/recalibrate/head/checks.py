"""Label sums that clients claim: whether any data could have them, and whether they fit the other clients'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.head.label_sums import LabelSums
from c2m3_fl.merging.recalibrate.outliers import LIMITS, far_from_others
from c2m3_fl.merging.recalibrate.ridge import Sums

MANY = 2**53  # examples: beyond it floats do not count any more
_ROUNDING = 1e-8  # relative to the mean diagonal: what rounding may take from a semidefinite matrix
# On scikit-learn's make_classification, 3 to 10 clients with all, two or one of ten classes: no honest client came
# nearer than .47 of both bounds at once, and inputs scaled by 3 always passed both.
_LIMIT, _FLOOR = 5.0, 3.0
_ENOUGH = 5  # examples of a class whose mean is compared
_NEARER = 0.5  # times the distance to the own class's mean: another class's mean that is nearer tells a wrong label


def check_label_sums(sums: Sums) -> None:
    """Raise `ParamsError` unless rows with one-hot targets can have these sums.

    Then the numbers per class are whole and not negative, classes without examples have no inputs, and the matrix
    of all second moments of inputs and targets is positive semidefinite.
    """
    classes, by_class, gram = sums.r[0], sums.xr[0], sums.xx[0]
    if bool((classes < 0).any()) or not 1 <= sums.count <= MANY:
        raise ParamsError(f"label sums are of {sums.count:g} examples, or fewer than none of a class")
    if not bool(by_class.isfinite().all() and gram.isfinite().all()):
        raise ParamsError("label sums hold NaN or infinite values, expected finite numbers")
    if bool(by_class[:, classes == 0].any()):
        raise ParamsError("label sums have inputs of a class without examples")
    scale = gram.diagonal().mean()
    if not bool(0 <= scale < torch.finfo(scale.dtype).max) or bool((gram.diagonal() < 0).any()):
        raise ParamsError("label sums have a negative or infinite sum of squares")
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    cross = (by_class / scale.sqrt()) / sums.count**0.5
    joint = torch.cat([torch.cat([gram / scale, cross], 1), torch.cat([cross.T, (classes / sums.count).diag()], 1)])
    eye = torch.eye(len(joint), dtype=joint.dtype, device=joint.device)
    _, failed = torch.linalg.cholesky_ex(joint + _ROUNDING * eye)
    if int(failed):
        raise ParamsError("label sums are of no data: their second moments are not positive semidefinite")


def outlying(answers: Sequence[LabelSums]) -> dict[int, str]:
    """Which clients do not fit the others, by index, and why.

    Parameters
    ----------
    answers : sequence of LabelSums
        One per client, each of which passed `check_label_sums`.

    Notes
    -----
    A Gram matrix per example is compared with the entrywise median of all, and its trace with the median trace for
    features that are too small; bounds are wide enough for clients with different classes. Labels are compared through
    the mean input per class, which does not depend on how many examples of a class a client has: they are at odds where
    most of a client's examples lie in classes whose mean is less than half as far from the others' mean of another
    class as from that of their own. Unless fewer than half of the clients are at odds, none is dropped for that.
    """
    found: dict[int, str] = {}
    grams = [answer.total.xx[0] / answer.count for answer in answers]
    for index in far_from_others(grams, limit=_LIMIT, floor=_FLOOR):
        found[index] = "its mean Gram matrix is far from the others'"
    powers = [float(gram.diagonal().sum()) for gram in grams]
    least = sorted(powers)[(len(powers) - 1) // 2] / LIMITS["inputs"] if powers else 0.0
    found |= {
        index: "its features are far smaller than the others'" for index, each in enumerate(powers) if each < least
    }
    rest = [index for index in range(len(answers)) if index not in found]
    odd = [index for index in rest if _mislabelled(answers, index, rest)]
    if len(rest) > 2 and 2 * len(odd) < len(rest):
        found |= dict.fromkeys(odd, "its class means are nearer to other classes of the other clients")
    return found


def _mislabelled(answers: Sequence[LabelSums], index: int, clients: Sequence[int]) -> bool:
    """Whether most of a client's examples, where they can be compared, lie in classes that look like others."""
    own = answers[index].total
    others = [answers[other].total for other in clients if other != index]
    if not others:
        return False
    counts = torch.stack([each.r[0] for each in others])
    shares = counts.clamp_max(float(counts.sum(1).median())) / counts.clamp_min(1)  # no claim outweighs the others
    known = (counts * shares).sum(0)
    sums = torch.stack([each.xr[0] * share for each, share in zip(others, shares, strict=True)]).sum(0)
    comparable = known >= _ENOUGH
    mine = comparable & (own.r[0] >= _ENOUGH)
    if int(comparable.sum()) < 2 or not bool(mine.any()):
        return False
    distance = torch.cdist(_means(own.xr[0], own.r[0])[mine], _means(sums, known)[comparable])
    same = mine.nonzero() == comparable.nonzero()[:, 0]  # one of each row
    to_own, to_others = (distance * same).sum(1), distance.masked_fill(same, float("inf")).amin(1)
    wrong = to_others < _NEARER * to_own
    return bool(2 * own.r[0][mine][wrong].sum() > own.count)


def _means(by_class: Tensor, counts: Tensor) -> Tensor:
    """Mean input per class, shape (classes, inputs)."""
    return (by_class / counts.clamp_min(1)).T
