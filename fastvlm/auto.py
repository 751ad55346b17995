"""`import fastvlm.auto` registers saved fastvlm models with the Auto classes of `transformers`.

from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

It is separate from `import fastvlm`, which must stay cheap: commands print their help without importing torch.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from fastvlm.deployment.processing import PartsVLMImageProcessor, PartsVLMProcessor
from fastvlm.models.saved import PartsVLMConfig, PartsVLMForConditionalGeneration

AutoConfig.register(PartsVLMConfig.model_type, PartsVLMConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForImageTextToText):
    auto.register(PartsVLMConfig, PartsVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(
    PartsVLMConfig, image_processor_classes={"torchvision": PartsVLMImageProcessor}, exist_ok=True
)
AutoProcessor.register(PartsVLMConfig, PartsVLMProcessor, exist_ok=True)
