import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from transformers import ResNetConfig
from transformers.modeling_outputs import BackboneOutput
from transformers.models.timm_backbone import TimmBackboneConfig

from hf_querydet.layers.backbone import Backbone
from hf_querydet.layers.frozen_batch_norm import (
    FrozenBatchNorm2d,
    NormalizingConv2d,
    fold_frozen_norms,
    freeze_batch_norm,
)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5, eps=1e-3),
        nn.BatchNorm2d(5, affine=False),
        BatchNormAct2d(5, act_layer=nn.SiLU),
        BatchNormAct2d(5, apply_act=False),
    ],
    ids=["eps", "without affine terms", "with activation", "activation off"],
)
def test_frozen_batch_norm_is_batch_norm_in_evaluation(norm):
    norm = norm.double().eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    features = torch.randn(2, 5, 3, 7, dtype=torch.float64)

    frozen = FrozenBatchNorm2d.from_batch_norm(norm).double().train()

    torch.testing.assert_close(frozen(features), norm(features))


def test_frozen_batch_norm_does_not_change_in_training():
    frozen = FrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(5)).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}

    frozen(torch.randn(2, 5, 3, 7) * 4 + 1)

    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert not list(frozen.parameters())
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_batch_norm_does_not_share_memory_with_the_norm_it_came_from():
    norm = nn.BatchNorm2d(5)
    frozen = FrozenBatchNorm2d.from_batch_norm(norm)

    norm.train()(torch.randn(2, 5, 3, 7) + 3)

    assert torch.equal(frozen.running_mean, torch.zeros(5))


def test_gradient_passes_through_frozen_batch_norm():
    frozen = FrozenBatchNorm2d(2)
    frozen.weight.copy_(torch.tensor([2.0, -3.0]))
    frozen.running_var.copy_(torch.tensor([4.0, 1.0]))
    features = torch.randn(1, 2, 3, 5, requires_grad=True)

    frozen(features).sum().backward()

    expected = torch.tensor([2.0 / (4 + 1e-5) ** 0.5, -3.0 / (1 + 1e-5) ** 0.5])
    torch.testing.assert_close(features.grad, expected[None, :, None, None].expand(1, 2, 3, 5))


# Folding into convolutions

CONFIGS = {
    "timm": TimmBackboneConfig(backbone="resnet18", out_indices=[2, 4]),
    "timm, norms with activation": TimmBackboneConfig(backbone="test_efficientnet"),
    "transformers": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 1, 1], layer_type="bottleneck"
    ),
}


def frozen_and_plain(config) -> tuple[Backbone, Backbone]:
    """A backbone with folded norms, and one in which batch norms run by themselves."""
    plain = Backbone(config, pretrained=False, norm="batch", num_frozen_stages=0)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    frozen = Backbone(config, pretrained=False, norm="frozen", num_frozen_stages=0)
    frozen.load_state_dict(plain.state_dict(), strict=False)
    return frozen.double().train(), plain.double().eval()


class ConvAndNorm(nn.Module):
    """The smallest body: subclasses say how its convolution and its norm are used."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(3)
        freeze_batch_norm(self)
        self.norm.weight.copy_(torch.tensor([0.5, -2.0, 3.0]))
        self.norm.running_mean.copy_(torch.tensor([1.0, -0.5, 0.25]))
        self.norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.5]))

    def features(self, picture):
        return self.norm(self.conv(picture))

    def forward(self, picture):
        return BackboneOutput(feature_maps=(self.features(picture),))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_norm_of_a_network_is_folded(name):
    frozen, _ = frozen_and_plain(CONFIGS[name])

    norms = [module for module in frozen.modules() if isinstance(module, FrozenBatchNorm2d)]

    assert norms
    assert all(norm.is_folded for norm in norms)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(33, 47), (160, 224)], ids=["small maps", "large maps"])
def test_folded_network_computes_what_batch_norms_compute(name, size):
    frozen, plain = frozen_and_plain(CONFIGS[name])
    pixel_values = torch.randn(2, 3, *size, dtype=torch.float64)

    for (ours, _), (theirs, _) in zip(frozen(pixel_values), plain(pixel_values), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_network_has_the_gradients_of_separate_norms(name):
    frozen, plain = frozen_and_plain(CONFIGS[name])
    pixel_values = torch.randn(1, 3, 96, 160, dtype=torch.float64)

    gradients = []
    for backbone in (frozen, plain):
        features = backbone(pixel_values)[-1][0]
        features.square().mean().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})

    weights = [key for key, gradient in gradients[0].items() if gradient is not None]
    assert weights
    for key in weights:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], msg=key)


def test_folding_keeps_the_names_in_a_saved_file():
    frozen, plain = frozen_and_plain(CONFIGS["timm"])

    names = {name for name in plain.state_dict() if not name.endswith("num_batches_tracked")}

    assert set(frozen.state_dict()) == names


def test_bias_of_a_convolution_is_normalised_too():
    body = ConvAndNorm(bias=True)
    picture = torch.randn(1, 3, 40, 50)
    expected = body.features(picture)

    fold_frozen_norms(body, 3)

    assert isinstance(body.conv, NormalizingConv2d)
    torch.testing.assert_close(body.features(picture), expected)


@pytest.mark.parametrize("size", [(5, 5), (5, 6)], ids=["fewer cells than weights", "more"])
def test_choice_by_size_does_not_change_the_result(size):
    body = ConvAndNorm(bias=False).double()
    picture = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = body.features(picture)

    fold_frozen_norms(body, 3)

    assert body.conv._folding_pays(picture) == (size == (5, 6))  # a filter has 27 weights
    torch.testing.assert_close(body.features(picture), expected)


class ReadTwice(ConvAndNorm):
    def features(self, picture):
        convolved = self.conv(picture)
        return self.norm(convolved) + convolved


class RunTwice(ConvAndNorm):
    def features(self, picture):
        return self.conv(self.norm(self.conv(picture)))


class OneNormForTwo(ConvAndNorm):
    def features(self, picture):
        return self.norm(self.conv(self.norm(picture)))


class Returned(ConvAndNorm):
    def forward(self, picture):
        convolved = self.conv(picture)
        return BackboneOutput(feature_maps=(convolved, self.norm(convolved)))


@pytest.mark.parametrize("body_class", [ReadTwice, RunTwice, OneNormForTwo, Returned])
def test_nothing_is_folded_where_another_reads_the_convolution(body_class):
    body = body_class()
    picture = torch.randn(1, 3, 40, 50)
    expected = body(picture).feature_maps

    fold_frozen_norms(body, 3)

    for ours, theirs in zip(body(picture).feature_maps, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_copy_of_a_network_reads_its_own_statistics():
    body = ConvAndNorm(bias=False)
    fold_frozen_norms(body, 3)
    picture = torch.randn(1, 3, 40, 50)
    before = body.features(picture)

    twin = copy.deepcopy(body)
    twin.norm.running_mean.add_(7)

    assert torch.equal(body.features(picture), before)
    assert not torch.allclose(twin.features(picture), before)


def test_folding_leaves_chance_and_tensors_alone():
    body = ConvAndNorm(bias=True)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    state = torch.get_rng_state()

    fold_frozen_norms(body, 3)

    assert torch.equal(torch.get_rng_state(), state)
    for name, value in body.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_adapter_for_a_folded_convolution_is_an_error():
    body = ConvAndNorm(bias=False)
    fold_frozen_norms(body, 3)

    # As LoRA makes the first of its two convolutions.
    with pytest.raises(TypeError, match=r"Adapters .* name linear layers as their targets"):
        type(body.conv)(3, 2, 3, padding=1, bias=False)


def test_folding_leaves_modes_as_they_were():
    body = ConvAndNorm(bias=False).train()
    body.norm.eval()

    fold_frozen_norms(body, 3)

    assert (body.training, body.conv.training, body.norm.training) == (True, True, False)


def test_norm_in_half_precision_is_that_of_float32_but_for_rounding():
    body = ConvAndNorm(bias=False)
    fold_frozen_norms(body, 3)
    picture = torch.randn(1, 3, 40, 50)
    expected = body.features(picture)

    features = body.bfloat16().features(picture.bfloat16())

    assert features.dtype == torch.bfloat16
    # 8 bits of mantissa, sums of 27 products.
    torch.testing.assert_close(features.float(), expected, rtol=0.05, atol=0.1)
