"""The last line of a job's script: begin the job again if its tasks died, but not for ever."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from pbkd.errors import UserError
from slurm import scheduler
from slurm.records import CANCEL, End, events, note, read_end, read_job, write_end

ON_ITS_WAY_SECONDS = 60.0


def main() -> int:
    """`python -m slurm.after_step EXIT_CODE_OF_SRUN FOLDER_OF_JOBS`; returns what the job is to exit with."""
    code, jobs = int(sys.argv[1]), Path(sys.argv[2])
    folder = jobs / scheduler.job_id()
    if (end := read_end(folder)) is not None:
        return end.code
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    happened = events(folder)
    is_on_its_way = any(event["type"] == "requeued" and event["restart"] == restart for event in happened)
    if is_on_its_way or scheduler.is_preempted():
        with suppress(UserError):  # it was requeued already, unless the tasks' container lacks scontrol
            scheduler.requeue()
        time.sleep(ON_ITS_WAY_SECONDS)  # Slurm ends this shell first
        return 1
    allowed = read_job(jobs, scheduler.job_id()).restarts
    failures = sum(event["type"] == "failed" for event in happened)
    note(folder, "failed", restart=restart, code=code)
    if failures < allowed and not (folder / CANCEL).exists():
        try:
            scheduler.requeue()
        except UserError as error:
            reason = f"its tasks died (code {code}), and it could not be requeued: {error}"
        else:
            time.sleep(ON_ITS_WAY_SECONDS)
            return 1
    else:
        reason = f"its tasks died {failures + 1} times (code {code}); what they said is in {folder}"
    write_end(folder, End(1, reason))
    return 1


if __name__ == "__main__":
    sys.exit(main())
