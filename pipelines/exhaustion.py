"""What to tell a user whose machine has run out of something: the cure, instead of a traceback."""

import errno

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
MORE_MEMORY = "lower data.batch_size, compute.workers or compute.concurrency"


def exhaustion(error: BaseException) -> str | None:
    """The message for an error that comes of a full or read-only disk, or of too little memory; else None."""
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f"{error.filename}: " if error.filename else ""
        return (
            f"{place}{error.strerror}\n"
            "what was written before is intact; make room, or it writable, and type the same command again"
        )
    is_allocation = isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )
    if isinstance(error, MemoryError) or is_allocation:
        reason = str(error).partition("\n")[0][:200] or "no more memory"
        return f"out of memory: {reason}\n{MORE_MEMORY}; the same command goes on from the last checkpoint"
    return None
