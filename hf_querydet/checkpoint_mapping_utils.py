"""Key tables that several variants share, and how tables are read.

A table maps regular expressions for names in other files to names here, see a variant's
``checkpoint_mapping.py``. Its lines are applied in their order, each to its first match.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightRenaming

# What a line makes of a name: another name; several for a tensor whose rows are split among them;
# or None for a tensor that nothing here needs.
Names = Mapping[str, str | tuple[str, ...] | None]

# ---- transformers' files -------------------------------------------------------------------------

# Some networks call parts as a transformer does (Swin: encoder.layers, mlp.fc1). The expressions
# below therefore name the layers that they mean.
TRANSFORMERS_BACKBONE = {
    # transformers' own networks.
    r"\bbackbone\.(?:conv_encoder\.)?model\.(?=embedd|encoder\.|hidden_states_norms|swin\.)": (
        "backbone.body."
    ),
    # timm's modules lie directly below the wrapper, or in version 4 below transformers' own.
    r"\bbackbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?": "backbone.body._backbone.",
    # Learned positions of version 4.
    r"\bbackbone\.position_embedding\.": "position_embedding.",
}
TRANSFORMERS_LAYERS = {
    r"^encoder\.layers\.": "encoder_layers.",
    r"^model\.encoder\.layers\.": "model.encoder_layers.",
    r"\bdecoder\.layers\.": "decoder_layers.",
    r"\bdecoder\.layernorm\.": "decoder_norm.",
    r"coder_layers\.(\d+)\.self_attn\.o(?:ut)?_proj\.": r"coder_layers.\1.self_attention.out_proj.",
    r"coder_layers\.(\d+)\.self_attn\.": r"coder_layers.\1.self_attention.",
    r"decoder_layers\.(\d+)\.encoder_attn\.o(?:ut)?_proj\.": (
        r"decoder_layers.\1.cross_attention.out_proj."
    ),
    r"decoder_layers\.(\d+)\.encoder_attn\.": r"decoder_layers.\1.cross_attention.",
    r"\.self_attn_layer_norm\.": ".self_attention_norm.",
    r"\.encoder_attn_layer_norm\.": ".cross_attention_norm.",
    r"\.final_layer_norm\.": ".feed_forward.norm.",
    r"coder_layers\.(\d+)\.(?:mlp\.)?fc1\.": r"coder_layers.\1.feed_forward.expand.",
    r"coder_layers\.(\d+)\.(?:mlp\.)?fc2\.": r"coder_layers.\1.feed_forward.contract.",
}


def weight_renamings(names: Mapping[str, str]) -> list[WeightRenaming]:
    """Turn a key table into what transformers applies while it loads, in the table's order."""
    return [WeightRenaming(source, target) for source, target in names.items()]


# ---- the authors' files --------------------------------------------------------------------------

AUTHORS_IGNORED: Names = {
    # Counters of batch norms that are frozen, and what profilers leave behind.
    r"\bnum_batches_tracked$": None,
    r"\btotal_(?:params|ops)$": None,
}
# Tables of rows and columns, where positions are learned.
AUTHORS_POSITIONS: Names = {
    r"^backbone\.1\.row_embed\.": "model.position_embedding.row_embeddings.",
    r"^backbone\.1\.col_embed\.": "model.position_embedding.column_embeddings.",
}
AUTHORS_BACKBONE: Names = {r"^backbone\.(?:0\.)?body\.": "model.backbone.body._backbone."}
# Query, key and value are one matrix of three times the rows.
AUTHORS_SELF_ATTENTION: Names = {
    r"\.self_attn\.in_proj_(weight|bias)$": (
        r".self_attention.q_proj.\1",
        r".self_attention.k_proj.\1",
        r".self_attention.v_proj.\1",
    ),
    r"\.self_attn\.out_proj\.": ".self_attention.out_proj.",
}
AUTHORS_FEED_FORWARD: Names = {
    r"\.linear1\.": ".feed_forward.expand.",
    r"\.linear2\.": ".feed_forward.contract.",
}
# What Conditional DETR has from DETR.
AUTHORS_DETR_NAMES: Names = {
    **AUTHORS_IGNORED,
    **AUTHORS_BACKBONE,
    **AUTHORS_POSITIONS,
    r"^input_proj\.": "model.input_projection.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^transformer\.(en|de)coder\.layers\.": r"model.\1coder_layers.",
    r"^transformer\.decoder\.norm\.": "model.decoder_norm.",
    **AUTHORS_SELF_ATTENTION,
    r"coder_layers\.(\d+)\.norm1\.": r"coder_layers.\1.self_attention_norm.",
    r"encoder_layers\.(\d+)\.norm2\.": r"encoder_layers.\1.feed_forward.norm.",
    r"decoder_layers\.(\d+)\.norm2\.": r"decoder_layers.\1.cross_attention_norm.",
    r"decoder_layers\.(\d+)\.norm3\.": r"decoder_layers.\1.feed_forward.norm.",
    **AUTHORS_FEED_FORWARD,
    r"^class_embed\.": "class_head.",
    r"^bbox_embed\.": "box_head.",
}
# Options of the authors' training scripts, which their checkpoints carry as `args`, and the fields
# that hold them. What tensors tell is read from tensors.
AUTHORS_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "nheads": ("encoder_attention_heads", "decoder_attention_heads"),
    "dropout": ("dropout", "attention_dropout", "activation_dropout"),
    "aux_loss": ("auxiliary_loss",),
    "set_cost_class": ("class_cost",),
    "set_cost_bbox": ("bbox_cost",),
    "set_cost_giou": ("giou_cost",),
    "cls_loss_coef": ("cls_loss_coefficient",),
    "bbox_loss_coef": ("bbox_loss_coefficient",),
    "giou_loss_coef": ("giou_loss_coefficient",),
    "eos_coef": ("eos_coefficient",),
    "focal_alpha": ("focal_alpha",),
}
# Blocks per stage, and whether a block has a third convolution. By torchvision's weights, the ones
# that the authors started from.
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18.tv_in1k",
    ((3, 4, 6, 3), False): "resnet34.tv_in1k",
    ((3, 4, 6, 3), True): "resnet50.tv_in1k",
    ((3, 4, 23, 3), True): "resnet101.tv_in1k",
    ((3, 8, 36, 3), True): "resnet152.tv_in1k",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model; the message says why."""


@dataclass(frozen=True)
class AuthorsFormat:
    """How to read the checkpoints of a variant's authors.

    Attributes:
        names: From the configuration to the key table.
        config: From the tensors, and the fields that are known from elsewhere, to the fields that
            tensors tell. Raises :class:`CheckpointError` for options that are not offered here.
        arguments: Options of the authors' training script to fields.
        may_be_dilated: From the fields that tensors tell to whether models with dilation were
            released beside those without. Tensors do not tell the two apart.
    """

    names: Callable[[Any], Names]
    config: Callable[["AuthorsTensors", Mapping[str, Any]], dict[str, Any]]
    arguments: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: AUTHORS_ARGUMENTS)
    may_be_dilated: Callable[[Mapping[str, Any]], bool] = lambda told: False


class AuthorsTensors(dict[str, Tensor]):
    """Tensors of a checkpoint by their authors' names, with questions that configurations ask."""

    def size(self, name: str, dim: int = 0) -> int:
        """Length of a dimension of a tensor that every checkpoint of the variant has.

        Raises:
            CheckpointError: If there is no such tensor, or it has no such dimension.
        """
        if name not in self:
            raise CheckpointError(
                f"The checkpoint lacks {name!r}, which tells the configuration; either it is not "
                "complete, or it holds another variant."
            )
        shape = self[name].shape
        if dim >= len(shape):
            raise CheckpointError(f"{name!r} has the shape {tuple(shape)} in the checkpoint.")
        return shape[dim]

    def count(self, pattern: str) -> int:
        """Number of layers: one more than the largest number that the pattern's group matches."""
        found = [re.search(pattern, name) for name in self]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def resnet(self, names: Names = AUTHORS_BACKBONE) -> dict[str, str]:
        """The field ``backbone``, told by the number of blocks.

        Args:
            names: Key table that leads to timm's names.

        Raises:
            CheckpointError: If it is none of the :data:`RESNETS`.
        """
        body = AuthorsTensors({one: self[name] for name in self for one in renamed(name, names)})
        blocks = tuple(body.count(rf"_backbone\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
        has_bottlenecks = "model.backbone.body._backbone.layer1.0.conv3.weight" in body
        if (blocks, has_bottlenecks) not in RESNETS:
            raise CheckpointError(
                f"The backbone has {blocks} blocks in its four stages, which is none of the known "
                "ResNets; either the checkpoint is not complete, or it holds another variant, or "
                'the backbone has to be named: --config with {"backbone": "timm\'s name"}.'
            )
        return {"backbone": RESNETS[blocks, has_bottlenecks]}


def renamed(name: str, names: Names) -> tuple[str, ...]:
    """Names that a tensor gets by a key table; none if nothing here needs it."""
    results = [name]
    for source, targets in names.items():
        if not any(re.search(source, result) for result in results):
            continue
        if targets is None:
            return ()
        if isinstance(targets, str):
            targets = (targets,)
        results = [
            re.sub(source, target, result, count=1) for result in results for target in targets
        ]
    return tuple(results)


def layer_sizes(tensors: AuthorsTensors, layers: str, linear: str = "linear1") -> dict[str, int]:
    """Number of encoder and decoder layers, and the inner sizes of their feed-forward blocks.

    Args:
        tensors: Of the checkpoint.
        layers: Name in front of a layer's number, with ``{}`` for "encoder" or "decoder".
        linear: Name of the first linear layer inside a layer.
    """
    fields = {}
    for kind in ("encoder", "decoder"):
        prefix = layers.format(kind)
        fields[f"{kind}_layers"] = tensors.count(rf"^{re.escape(prefix)}\.(\d+)\.")
        if fields[f"{kind}_layers"] or kind == "decoder":
            fields[f"{kind}_ffn_dim"] = tensors.size(f"{prefix}.0.{linear}.weight")
    return fields


def position_embedding_type(tensors: AuthorsTensors) -> dict[str, str]:
    """The field of that name: tables are stored, the sine embedding is not."""
    has_tables = "backbone.1.row_embed.weight" in tensors
    return {"position_embedding_type": "learned" if has_tables else "sine"}


def detr_fields(tensors: AuthorsTensors) -> dict[str, Any]:
    """Fields that tensors by :data:`AUTHORS_DETR_NAMES` tell.

    Raises:
        CheckpointError: If the checkpoint was trained with the pre-norm option.
    """
    if "transformer.encoder.norm.weight" in tensors:
        raise CheckpointError(
            "The checkpoint was trained with pre_norm, which this library does not offer; "
            "none of the authors' released models has it."
        )
    return {
        **tensors.resnet(),
        **layer_sizes(tensors, "transformer.{}.layers"),
        **position_embedding_type(tensors),
        "num_queries": tensors.size("query_embed.weight"),
        "d_model": tensors.size("query_embed.weight", 1),
    }
