"""Hydra config source that finds `experiment=<study>` in experiments/<study>/study.yaml, one folder per study.

Hydra's file source would need `experiments/experiment/<study>.yaml`, away from the study's claims and results.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

GROUP = "experiment"


class StudiesSource(ConfigSource):
    """Reads `studies://<folder>` on Hydra's search path."""

    @staticmethod
    def scheme() -> str:
        return "studies"

    def _file(self, config_path: str) -> Path:
        group, _, study = config_path.removesuffix(".yaml").rpartition("/")
        return Path(self.path) / study / "study.yaml" if group == GROUP else Path(self.path) / "no group of this source"

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if not file.is_file():
            raise ConfigLoadError(f"Config not found : {file}")
        text = file.read_text(encoding="utf-8")
        return ConfigResult(
            config=OmegaConf.create(text),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=ConfigSource._get_header_dict(text[:512]),
        )

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter is ObjectType.CONFIG else [GROUP]
        if config_path != GROUP or results_filter is ObjectType.GROUP:
            return []
        return sorted(file.parent.name for file in Path(self.path).glob("*/study.yaml"))
