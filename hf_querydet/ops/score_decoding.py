"""Logits to scored detections: one per query by softmax, or pairs of query and class by sigmoid."""

from torch import Tensor


def decode_softmax_scores(
    logits: Tensor, top_k: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read one detection per query: the best real class of a softmax.

    The last column is "no object". It takes part in the softmax and is then dropped, so that a
    query that sees nothing returns its best class with a low score. DETR (arXiv:2005.12872), Sec.
    3.1.

    Args:
        logits: (batch, num_queries, num_labels + 1), raw.
        top_k: Keep the best of the queries; None keeps all.

    Returns:
        Scores (batch, n) in descending order, labels int64 (batch, n), queries int64 (batch, n),
        where n is num_queries or ``top_k``, whichever is less.
    """
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    scores, queries = scores[:, :top_k], order[:, :top_k]
    return scores, labels.gather(1, queries), queries


def decode_sigmoid_scores(logits: Tensor, top_k: int | None = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Read the best pairs of query and class: every class is a detector of its own.

    A query may be returned several times, with different classes. The way of the detectors that
    train with focal loss, Deformable DETR (arXiv:2010.04159) and others.

    Args:
        logits: (batch, num_queries, num_labels), raw.
        top_k: How many pairs; None returns all.

    Returns:
        Scores (batch, n) in descending order, labels int64 (batch, n), queries int64 (batch, n),
        where n is num_queries * num_labels or ``top_k``, whichever is less.
    """
    num_labels = logits.shape[-1]
    scores = logits.sigmoid().flatten(1)
    num_pairs = scores.shape[1]
    scores, pairs = scores.topk(num_pairs if top_k is None else min(top_k, num_pairs), dim=1)
    return scores, pairs % num_labels, pairs // num_labels
