"""pbkd makes trained CNN classifiers smaller and faster: blockwise distillation, two-stage distillation, pruning."""

__version__ = "0.1.0"
