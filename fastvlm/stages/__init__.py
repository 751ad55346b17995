from fastvlm.stages.adamw_8bit import adamw_8bit
from fastvlm.stages.contrastive import ContrastiveStage
from fastvlm.stages.dense_labels import DenseLabelStage
from fastvlm.stages.language import LanguageStage
from fastvlm.stages.muon import MuonAdamW
from fastvlm.stages.stage import Stage

__all__ = ["ContrastiveStage", "DenseLabelStage", "LanguageStage", "MuonAdamW", "Stage", "adamw_8bit"]
