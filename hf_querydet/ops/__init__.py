"""Operations on boxes and feature levels."""

from hf_querydet.ops.deformable_attention_op import ms_deform_attn

__all__ = ["ms_deform_attn"]
