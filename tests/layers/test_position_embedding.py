import math

import pytest
import torch

from hf_querydet.layers.position_embedding import (
    LearnedPositionEmbedding,
    SinePositionEmbedding,
    sine_features,
)

HEIGHT, WIDTH = 5, 7


def sine_feature(position: float, index: int, num_features: int) -> float:
    angle = position / 10000 ** (2 * (index // 2) / num_features)
    return math.sin(angle) if index % 2 == 0 else math.cos(angle)


def padded_mask(valid_sizes: list[tuple[int, int]]) -> torch.Tensor:
    padding_mask = torch.ones(len(valid_sizes), HEIGHT, WIDTH, dtype=torch.bool)
    for picture, (height, width) in enumerate(valid_sizes):
        padding_mask[picture, :height, :width] = False
    return padding_mask


def test_sine_features_alternate_sine_and_cosine_of_the_same_frequency():
    positions = torch.tensor([[0.0, 0.3, 2.5], [6.28, 1.0, 4.0]])
    expected = [
        [[sine_feature(p, index, 6) for index in range(6)] for p in row]
        for row in positions.tolist()
    ]

    # Default tolerance of float32.
    torch.testing.assert_close(sine_features(positions, 6), torch.tensor(expected))


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_sine_embedding_encodes_y_then_x_relative_to_the_valid_part(offset, device):
    valid_sizes = [(5, 7), (3, 4)]
    embedding = SinePositionEmbedding(8, offset=offset)(padded_mask(valid_sizes).to(device))

    assert embedding.shape == (2, HEIGHT * WIDTH, 8)
    for picture, (height, width) in enumerate(valid_sizes):
        expected = torch.tensor(
            [
                [
                    [
                        sine_feature((row + 1 + offset) / height * 2 * math.pi, i, 4)
                        for i in range(4)
                    ]
                    + [
                        sine_feature((column + 1 + offset) / width * 2 * math.pi, i, 4)
                        for i in range(4)
                    ]
                    for column in range(width)
                ]
                for row in range(height)
            ]
        )
        valid = embedding[picture].view(HEIGHT, WIDTH, 8)[:height, :width].cpu()
        # The authors add 1e-6 to the count they divide by, at most 3e-7 of an angle of 2 pi.
        torch.testing.assert_close(valid, expected, rtol=0, atol=5e-6)


def test_positions_of_a_picture_do_not_depend_on_its_padding():
    alone = SinePositionEmbedding(12)(torch.zeros(1, 3, 4, dtype=torch.bool))
    padded = SinePositionEmbedding(12)(padded_mask([(3, 4)]))

    torch.testing.assert_close(padded.view(HEIGHT, WIDTH, 12)[:3, :4], alone.view(3, 4, 12))


def test_sine_embedding_is_float32_and_finite_where_all_is_padding():
    embedding = SinePositionEmbedding(8)(torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool))

    assert embedding.dtype == torch.float32
    assert embedding.isfinite().all()


def test_learned_embedding_puts_the_column_before_the_row():
    layer = LearnedPositionEmbedding(6, max_cells=9)

    embedding = layer(torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool))

    assert embedding.shape == (2, HEIGHT * WIDTH, 6)
    for picture in range(2):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                cell = embedding[picture, row * WIDTH + column]
                assert torch.equal(cell[:3], layer.column_embeddings.weight[column])
                assert torch.equal(cell[3:], layer.row_embeddings.weight[row])


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 5)])
def test_learned_embedding_refuses_a_map_larger_than_its_tables(height, width):
    layer = LearnedPositionEmbedding(4, max_cells=4)
    layer(torch.zeros(1, 4, 4, dtype=torch.bool))

    with pytest.raises(ValueError, match=f"reach 4 cells a side.* {height} x {width}; use smaller"):
        layer(torch.zeros(1, height, width, dtype=torch.bool))
