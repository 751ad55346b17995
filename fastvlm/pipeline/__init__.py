"""Run a configuration: a chain of stages, each found finished or trained, then evaluation and report."""

from fastvlm.pipeline.chain import Pipeline

__all__ = ["Pipeline"]
