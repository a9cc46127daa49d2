import pytest
import torch

from hf_querydet.ops.score_decoding import decode_sigmoid_scores, decode_softmax_scores


def sigmoid_logits():
    """Two pictures, two queries, three classes."""
    return torch.tensor(
        [[[0.9, 0.1, 0.2], [0.3, 0.7, 0.6]], [[0.05, 0.06, 0.07], [0.01, 0.02, 0.8]]]
    ).logit()


def test_sigmoid_reads_the_best_pairs_of_query_and_class():
    scores, labels, queries = decode_sigmoid_scores(sigmoid_logits(), top_k=4)

    torch.testing.assert_close(
        scores, torch.tensor([[0.9, 0.7, 0.6, 0.3], [0.8, 0.07, 0.06, 0.05]])
    )
    assert labels.tolist() == [[0, 1, 2, 0], [2, 2, 1, 0]]
    assert queries.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("top_k", [None, 6, 100])
def test_sigmoid_returns_all_pairs_at_most(top_k):
    assert decode_sigmoid_scores(sigmoid_logits(), top_k)[0].shape == (2, 6)


def test_softmax_reads_one_class_per_query_and_drops_the_last():
    # "No object" is the likeliest of the first query; its best real class remains.
    probabilities = torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.2, 0.3]]])

    scores, labels, queries = decode_softmax_scores(probabilities.log())

    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.3]]))
    assert labels.tolist() == [[0, 1]]
    assert queries.tolist() == [[1, 0]]


def test_softmax_keeps_the_best_queries():
    probabilities = torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.2, 0.3]]])

    scores, labels, queries = decode_softmax_scores(probabilities.log(), top_k=1)

    assert (scores.shape, labels.tolist(), queries.tolist()) == ((1, 1), [[0]], [[1]])
