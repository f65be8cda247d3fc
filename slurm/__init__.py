"""Launching on Slurm, through submitit: a Ray cluster over an allocation, with a `pbkd` command in it."""
