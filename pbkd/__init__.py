"""Makes trained CNN classifiers smaller and faster: blockwise and two-stage distillation, pruning."""

__version__ = "0.1.0"
