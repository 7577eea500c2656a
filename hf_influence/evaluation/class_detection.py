"""Class detection: are the training examples that influence a query those of its own class?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.utils import Bunch

from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import check_single, labels_for, one_each
from hf_influence.scores import Scores


def class_detection(
    scores: Scores,
    train_labels: Sequence[int] | Sequence[str],
    query_labels: Sequence[int] | Sequence[str],
    *,
    absolute: bool = True,
) -> Bunch:
    """AUC and recall with which each query's influence finds the training examples of the query's class.

    For query j with k training examples of its class, and s_i = |score[i, j]|:

        AUC_j    = P(s_a > s_b) + ½ P(s_a = s_b),   a of the class, b of another
        recall_j = share of the class among the k largest s_i

    Ties are broken at random in expectation, so the order of the rows never matters; scores that are all
    equal give ½ and k/n. Cost: one sort per query.

    Use it where no harm was planted but classes, tasks or sources are known. See also: mislabel_detection.
    Source: Kwon et al., DataInf, ICLR 2024, section 4.3; Chhabra et al., Outlier Gradient Analysis, section 7.

    Args:
        scores: One column per query, `[n, q]`.
        train_labels: n classes in dataset order; in the order of `scores.ids` where these are not dataset indices.
        query_labels: q classes in the order of the columns, as `scores.query_ids`.
        absolute: Rank by magnitude, as the papers do; `False` ranks by the signed score.

    Returns:
        `auc_mean`, `auc_std`, `recall_mean`, `recall_std` (population deviations over the queries) and `skipped`:
        how many queries were left out because all or none of the training examples are of their class. Read
        as `result["auc_mean"]` or `result.auc_mean`.

    Raises:
        BadSetting: Labels that do not fit the scores, scores without queries, or nothing left to measure.
        BadExample: An example with several labels.

    >>> import torch
    >>> scores = Scores(torch.tensor([[3.0, 0.1], [-2.0, 0.3], [1.0, 0.2]]), [0, 1, 2], "ip", query_ids=[0, 1])
    >>> class_detection(scores, ["math", "math", "poem"], ["math", "poem"]).auc_mean
    0.75
    """
    if scores.query_ids is None:
        raise BadSetting(
            f"the scores of '{scores.method}' are one column that belongs to no query, and class detection ranks the "
            "training examples for each query. Use a method that compares with queries, such as 'ip' or 'datainf'."
        )
    train = labels_for(scores, train_labels, "train_labels")
    query = one_each(len(scores.query_ids), query_labels, "query_labels", "queries or groups of them")
    check_single(train, "train_labels")
    check_single(query, "query_labels")
    values = scores.values.double().cpu().numpy()  # [n, q]
    strength = np.abs(values) if absolute else values

    members = {label: np.array([other == label for other in train]) for label in set(query)}  # class -> [n]
    measured = [j for j, label in enumerate(query) if 0 < members[label].sum() < len(train)]
    if not measured:
        raise BadSetting(
            f"none of the {len(query)} queries has training examples both in and outside its class (classes of the "
            f"queries: {_some(query)}; of the training examples: {_some(train)}), so there is nothing to tell apart. "
            "Check that both use the same labels, of the same type."
        )
    auc = np.array([roc_auc_score(members[query[j]], strength[:, j]) for j in measured])
    recall = np.array([_recall(members[query[j]], strength[:, j]) for j in measured])
    return Bunch(
        auc_mean=float(auc.mean()),
        auc_std=float(auc.std()),
        recall_mean=float(recall.mean()),
        recall_std=float(recall.std()),
        skipped=len(query) - len(measured),
    )


def _recall(member: np.ndarray, strength: np.ndarray) -> float:
    """Expected share of the k members among the k strongest, ties at the border drawn at random."""
    k = int(member.sum())
    border = np.partition(strength, -k)[-k]
    above, level = strength > border, strength == border
    share = (k - above.sum()) / level.sum()  # of those level with the border, how many fit in
    return float((member & above).sum() + share * (member & level).sum()) / k


def _some(labels: list[int] | list[str]) -> str:
    distinct = list(dict.fromkeys(map(repr, labels)))
    return ", ".join(distinct[:5]) + (", …" if len(distinct) > 5 else "")
