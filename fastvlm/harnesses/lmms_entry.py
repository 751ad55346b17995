"""The model manifest lmms-eval reads on start; contains only names, so that nothing else is imported until used."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="fastvlm", chat_class_path="fastvlm.harnesses.lmms.FastVLM")
