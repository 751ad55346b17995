"""A configuration, made real: a chain of stages, found or trained, then evaluated and reported."""

from fastvlm.pipeline.chain import Pipeline

__all__ = ["Pipeline"]
