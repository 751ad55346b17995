"""Pretrained vision-language models of `transformers`, split into the four parts of `VLM`."""

from fastvlm.models.pretrained.load import from_pretrained, without_weights
from fastvlm.models.pretrained.traditional import traditional
from fastvlm.models.pretrained.whole import PretrainedVLM

__all__ = ["PretrainedVLM", "from_pretrained", "traditional", "without_weights"]
