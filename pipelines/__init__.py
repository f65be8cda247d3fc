"""Orchestration: from a recipe to a graph of stages, run as jobs, kept in a store, tracked in MLflow."""
