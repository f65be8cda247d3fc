"""Data sets, their identity, and the reader that gives the same batches to every world size."""

from pbkd.data.digest import Identity, data_digest, data_identity
from pbkd.data.loader import look_at, resolve_loader
from pbkd.data.reader import Batch, Data, Reader, open_data
from pbkd.data.settings import READER_VERSION, AbsolutePath, DataInfo, DataSettings
from pbkd.preprocessing import Preprocessing

__all__ = [
    "READER_VERSION",
    "AbsolutePath",
    "Batch",
    "Data",
    "DataInfo",
    "DataSettings",
    "Identity",
    "Preprocessing",
    "Reader",
    "data_digest",
    "data_identity",
    "look_at",
    "open_data",
    "resolve_loader",
]
