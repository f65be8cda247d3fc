#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --job-name=pbkd-small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/s/slurm/%j/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=240

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /s/slurm/%j/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -u -m submitit.core._submit /s/slurm/%j


# teardown
PYTHON -m slurm.after_step $? /s/slurm
# 0: pbkd run tests/integration/small.yaml --store /s
#!/bin/bash

# Parameters
#SBATCH --array=0-2%3
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --job-name=pbkd-small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/s/slurm/%A_%a/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=60

# setup
module load cuda/12

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /s/slurm/%A_%a/%A_%a_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=8 --container-image=/images/pbkd.sqsh /opt/venv/bin/python -u -m submitit.core._submit /s/slurm/%j


# teardown
PYTHON -m slurm.after_step $? /s/slurm
# 0: pbkd run tests/integration/small.yaml seed=0 --store /s
# 1: pbkd run tests/integration/small.yaml seed=1 --store /s
# 2: pbkd run tests/integration/small.yaml seed=2 --store /s
