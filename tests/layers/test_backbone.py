import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import AutoConfig, ResNetConfig, ResNetForImageClassification
from transformers.models.timm_backbone import TimmBackboneConfig

from hf_querydet.layers.backbone import Backbone, resize_padding_mask
from hf_querydet.layers.frozen_batch_norm import FrozenBatchNorm2d

TINY_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def build(config, *, pretrained=False, norm="frozen", num_frozen_stages=0) -> Backbone:
    return Backbone(config, pretrained=pretrained, norm=norm, num_frozen_stages=num_frozen_stages)


def timm_config(name: str = "test_resnet", **options) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone=name, **({"out_indices": [4]} | options))


def randomize_norms(module: nn.Module) -> None:
    """Statistics and affine terms unlike those of a new batch norm."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


# What is trained

FROZEN_PREFIXES = {
    "test_resnet": [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)],
    "resnet18": [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)],
    "test_convnext": [("stem",), ("stages_0",), ("stages_1",), ("stages_2",), ("stages_3",)],
}


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("num_frozen_stages", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("name", "out_indices"),
    [("test_resnet", [4]), ("resnet18", [2, 4]), ("test_convnext", [3])],
)
def test_exactly_the_leading_stages_of_a_timm_backbone_are_frozen(
    name, out_indices, num_frozen_stages, norm
):
    config = timm_config(name, out_indices=out_indices)
    prefixes = tuple(
        f"_backbone.{prefix}"
        for stage in FROZEN_PREFIXES[name][:num_frozen_stages]
        for prefix in stage
    )

    body = build(config, norm=norm, num_frozen_stages=num_frozen_stages).body

    trained = {name for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in body.named_parameters() if not n.startswith(prefixes)}
    assert prefixes == () or any(n.startswith(prefixes) for n, _ in body.named_parameters())


@pytest.mark.parametrize("num_frozen_stages", [0, 1, 2, 5])
def test_exactly_the_leading_stages_of_a_transformers_backbone_are_frozen(num_frozen_stages):
    stages = ["embedder.", *(f"encoder.stages.{stage}." for stage in range(4))]
    prefixes = tuple(stages[:num_frozen_stages])

    backbone = build(ResNetConfig(**TINY_RESNET), num_frozen_stages=num_frozen_stages)

    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name


def test_paper_freezes_222400_numbers_of_resnet50():
    with torch.device("meta"):
        backbone = build(timm_config("resnet50.tv_in1k"), pretrained=True, num_frozen_stages=2)

    frozen = [p.numel() for p in backbone.parameters() if not p.requires_grad]
    # 41,524,768 - 41,302,368, the numbers of the authors' model with and without them.
    assert sum(frozen) == 222_400


@pytest.mark.parametrize(
    ("config", "prefixes"),
    [
        (timm_config(), ("_backbone.conv1", "_backbone.bn1", "_backbone.layer1")),
        (ResNetConfig(**TINY_RESNET), ("embedder.", "encoder.stages.0.")),
    ],
    ids=["timm", "transformers"],
)
def test_norms_of_frozen_stages_are_frozen_and_the_others_are_not(config, prefixes):
    body = build(config, norm="batch", num_frozen_stages=2).body

    norms = {
        name: type(module)
        for name, module in body.named_modules()
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
    }
    assert {FrozenBatchNorm2d, nn.BatchNorm2d} == set(norms.values())
    for name, kind in norms.items():
        assert (kind is FrozenBatchNorm2d) == name.startswith(prefixes), name


def test_no_batch_norm_is_left_with_frozen_norms():
    backbone = build(timm_config(), norm="frozen", num_frozen_stages=0)

    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())


def test_freezing_norms_keeps_the_features_of_evaluation():
    frozen, plain = build(timm_config()), build(timm_config(), norm="batch").eval()
    randomize_norms(plain)
    frozen.load_state_dict(plain.state_dict(), strict=False)
    pixel_values = torch.randn(2, 3, 45, 67, dtype=torch.float64)

    features = frozen.double().train()(pixel_values)[0][0]

    torch.testing.assert_close(features, plain.double()(pixel_values)[0][0])


# Feature maps


def test_maps_come_from_fine_to_coarse_with_the_announced_channels():
    backbone = build(timm_config(out_indices=[2, 3, 4]))

    maps = backbone(torch.randn(2, 3, 45, 67))

    assert backbone.channels == [48, 192, 96]
    # Every halving rounds up: 45 -> 23 -> 12 -> 6 -> 3 -> 2, 67 -> 34 -> 17 -> 9 -> 5 -> 3.
    expected = [(2, 48, 6, 9), (2, 192, 3, 5), (2, 96, 2, 3)]
    assert [tuple(features.shape) for features, _ in maps] == expected
    assert [mask for _, mask in maps] == [None, None, None]


def test_maps_are_laid_out_channels_last():
    backbone = build(timm_config(out_indices=[2, 3, 4]))

    for features, _ in backbone(torch.randn(2, 3, 65, 97)):
        assert features.is_contiguous(memory_format=torch.channels_last)


def test_each_map_has_a_padding_mask_of_its_size():
    backbone = build(timm_config(out_indices=[2, 4]))
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    pixel_mask[1, 32:] = 0
    pixel_mask[1, :, 32:] = 0

    (_, fine), (_, coarse) = backbone(torch.randn(2, 3, 64, 96), pixel_mask)

    assert fine.dtype == coarse.dtype == torch.bool
    assert fine.shape == (2, 8, 12)
    assert not fine[0].any()
    assert not coarse[0].any()
    assert (~coarse[1]).nonzero().tolist() == [[0, 0]]
    assert (~fine[1]).nonzero().tolist() == [[row, col] for row in range(4) for col in range(4)]


@pytest.mark.parametrize(
    ("size", "map_size"), [((37, 53), (5, 7)), ((45, 67), (2, 3)), ((7, 11), (7, 11))]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_mask_is_resized_by_the_authors_nearest_rule(size, map_size, dtype):
    pixel_mask = torch.rand(3, *size) < 0.5
    expected = torch.empty(3, *map_size, dtype=torch.bool)
    for row in range(map_size[0]):
        for column in range(map_size[1]):
            source = row * size[0] // map_size[0], column * size[1] // map_size[1]
            expected[:, row, column] = ~pixel_mask[:, source[0], source[1]]

    padding_mask = resize_padding_mask(pixel_mask.to(dtype), torch.empty(3, 2, *map_size))

    assert torch.equal(padding_mask, expected)


def test_no_pixel_mask_means_no_padding_mask():
    assert resize_padding_mask(None, torch.empty(1, 2, 3, 5)) is None


def test_batch_without_padding_has_no_padding_mask():
    backbone = build(timm_config(out_indices=[2, 4]))
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)

    maps = backbone(torch.randn(2, 3, 64, 96), pixel_mask)

    assert [mask for _, mask in maps] == [None, None]


def test_dilated_last_stage_is_that_of_torchvision():
    backbone = build(timm_config("resnet26", output_stride=16))
    # Two blocks a stage: the first keeps its 3x3 convolution undilated, the second does not.
    reference = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck,
        [2, 2, 2, 2],
        replace_stride_with_dilation=[False, False, True],
    )
    weights = {
        name.removeprefix("_backbone."): value for name, value in backbone.body.state_dict().items()
    }
    reference.load_state_dict(weights, strict=False)
    reference = nn.Sequential(*list(reference.eval().children())[:-2])
    pixel_values = torch.randn(1, 3, 75, 101)

    features = backbone.eval()(pixel_values)[0][0]

    assert features.shape == (1, 2048, 5, 7)
    # The convolutions are the same calls; the norm is one kernel here and there.
    torch.testing.assert_close(features, reference(pixel_values), rtol=1e-4, atol=1e-4)


# Pretrained weights


@pytest.fixture
def timm_folder(tmp_path):
    """A folder as timm's hub writes it, and the weights in it."""
    model = timm.create_model("test_resnet")
    randomize_norms(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return tmp_path, model.state_dict()


@pytest.fixture
def transformers_folder(tmp_path):
    """A classifier saved by transformers, and its weights without the head."""
    model = ResNetForImageClassification(ResNetConfig(**TINY_RESNET))
    randomize_norms(model)
    model.save_pretrained(tmp_path)
    return tmp_path, model.resnet.state_dict()


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("output_stride", [None, 16])
def test_published_weights_of_timm_are_loaded(timm_folder, norm, output_stride):
    folder, weights = timm_folder
    config = timm_config(f"local-dir:{folder}", output_stride=output_stride)

    loaded = build(config, pretrained=True, norm=norm, num_frozen_stages=2).body.state_dict()

    assert len(loaded) > 50
    for name, value in loaded.items():
        assert torch.equal(value, weights[name.removeprefix("_backbone.")]), name


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_published_weights_of_transformers_are_loaded(transformers_folder, norm):
    folder, weights = transformers_folder
    config = AutoConfig.from_pretrained(folder, out_indices=[2, 4])

    loaded = build(config, pretrained=True, norm=norm, num_frozen_stages=2).body.state_dict()

    assert len(loaded) > 30
    for name, value in loaded.items():
        assert torch.equal(value, weights[name]), name


def test_random_weights_are_kept_unless_published_ones_are_asked_for(timm_folder):
    folder, weights = timm_folder

    backbone = build(timm_config(f"local-dir:{folder}"), pretrained=False)

    loaded = backbone.body._backbone.layer1[0].conv1.weight
    assert not torch.equal(loaded, weights["layer1.0.conv1.weight"])


def test_nothing_is_loaded_on_the_meta_device():
    # The name has no weights on this machine: an attempt to load them would raise.
    with torch.device("meta"):
        backbone = build(timm_config("test_resnet.r160_in1k"), pretrained=True)

    assert {tensor.device.type for tensor in backbone.state_dict().values()} == {"meta"}


def test_weights_that_cannot_be_had_are_an_error_with_remedies():
    with pytest.raises(OSError, match=r"'test_resnet.r160_in1k' could not be loaded \(") as caught:
        build(timm_config("test_resnet.r160_in1k"), pretrained=True)

    assert "Connect to the network" in str(caught.value)
    assert "use_pretrained_backbone=False" in str(caught.value)


def test_folder_without_weights_is_an_error_with_remedies(transformers_folder):
    folder, _ = transformers_folder
    config = AutoConfig.from_pretrained(folder)
    (folder / "model.safetensors").unlink()

    with pytest.raises(OSError, match=r"could not be loaded.*use_pretrained_backbone=False"):
        build(config, pretrained=True)


def test_architecture_without_a_name_has_no_published_weights():
    with pytest.raises(ValueError, match="does not know which weights to load"):
        build(ResNetConfig(**TINY_RESNET), pretrained=True)


# Errors of freezing


def test_more_frozen_stages_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="is 6, but the backbone has 5 stages with its stem"):
        build(timm_config(), num_frozen_stages=6)


def test_freezing_stages_that_cannot_be_told_apart_is_an_error():
    build(timm_config("test_efficientnet"), num_frozen_stages=0)

    with pytest.raises(ValueError, match="EfficientNetFeatures cannot be told apart"):
        build(timm_config("test_efficientnet"), num_frozen_stages=1)


def test_frozen_stages_can_be_frozen_again():
    backbone = build(timm_config(), num_frozen_stages=2)
    expected = {name: p.requires_grad for name, p in backbone.named_parameters()}
    backbone.requires_grad_(True)

    backbone.freeze_stages()

    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == expected


def test_maps_with_their_channels_last_are_an_error():
    config = TimmBackboneConfig(backbone="swin_tiny_patch4_window7_224", out_indices=[-1])
    with torch.device("meta"), pytest.raises(ValueError, match="maps with their channels last"):
        Backbone(config, pretrained=False, norm="batch", num_frozen_stages=0)
