"""Launching on Slurm through submitit. Nothing is here yet: clusters come after the main job."""
