from fastvlm.models.llms.language_model import LanguageModel, from_config, from_pretrained

__all__ = ["LanguageModel", "from_config", "from_pretrained"]
