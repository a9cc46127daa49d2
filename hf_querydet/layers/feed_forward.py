"""The kinds of stacked linear layers in a detection transformer."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_querydet.layers.dropout import Dropout, ReluDropout

# Values between the two layers of a feed-forward block that are computed at a time on CPUs: as many
# as caches hold, 8 MB in float32.
INNER_VALUES = 2**21


class FeedForward(nn.Module):
    """Position-wise block of a transformer layer: expand, activate, contract, add, normalise.

    Post-norm, as in all released detection transformers (arXiv:1706.03762, Sec. 3.3).

    Args:
        hidden_size: Channels in and out.
        inner_size: Channels between the two linear layers.
        activation: Name of the activation, ``"relu"`` in the papers.
        dropout: Dropout before the residual sum.
        activation_dropout: Dropout after the activation.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        inner_size: int,
        activation: str = "relu",
        dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, inner_size)
        # One step for the papers' activation, because these are the largest tensors of a detector.
        self.activation = (
            ReluDropout(activation_dropout)
            if activation == "relu"
            else nn.Sequential(ACT2FN[activation], Dropout(activation_dropout))
        )
        self.contract = nn.Linear(inner_size, hidden_size)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform every token on its own, (..., hidden_size) to the same shape."""
        # Flat, because what a linear layer returns for more dimensions is a view, and autograd
        # copies gradients for a view that is changed in place.
        tokens = hidden_states.flatten(0, -2)
        if self._goes_piecewise(tokens):
            pieces = tokens.split(self._piece_size)
            output = torch.cat([self._transform(piece) for piece in pieces])
        else:
            output = self._transform(tokens)
        return output.view_as(hidden_states)

    @property
    def _piece_size(self) -> int:
        return max(1, INNER_VALUES // self.expand.out_features)

    def _goes_piecewise(self, tokens: Tensor) -> bool:
        """On a CPU, where large tensors wait for memory. Compilers make pieces of their own."""
        return (
            tokens.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and len(tokens) > self._piece_size
        )

    def _transform(self, tokens: Tensor) -> Tensor:
        """(tokens, hidden_size) to the same shape."""
        update = self.activation(self.expand(tokens))
        return self.norm(tokens + self.dropout(self.contract(update)))


class MLP(nn.Module):
    """Linear layers with a ReLU between each two, for instance the box head of DETR.

    Args:
        input_size: Channels in.
        hidden_size: Channels between the layers.
        output_size: Channels out.
        num_layers: Number of linear layers.
    """

    def __init__(
        self, *, input_size: int, hidden_size: int, output_size: int, num_layers: int
    ) -> None:
        super().__init__()
        sizes = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        self.layers = nn.ModuleList(
            nn.Linear(size_in, size_out) for size_in, size_out in pairwise(sizes)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layers, (..., input_size) to (..., output_size)."""
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


class PredictionTower(nn.Module):
    """Linear layers without bias, each followed by layer normalisation and ReLU.

    What stands before the class layer and the box layer of Sparse R-CNN (arXiv:2011.12450); the
    paper calls it a perceptron, normalisation and missing biases are the authors' code.

    Args:
        hidden_size: Channels in and out.
        num_layers: Number of linear layers.
    """

    def __init__(self, *, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(num_layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform every token on its own, (..., hidden_size) to the same shape."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden_states = norm(layer(hidden_states)).relu()
        return hidden_states
