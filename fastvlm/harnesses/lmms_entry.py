"""What lmms-eval reads when it looks for models: names alone, so that nothing is imported that is not asked for."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="fastvlm", chat_class_path="fastvlm.harnesses.lmms.FastVLM")
