"""Data sets, their identity, and the reader that gives the same batches to every world size."""

from pbkd.data.digest import data_digest
from pbkd.data.loader import resolve_loader
from pbkd.data.reader import Batch, Data, Reader, open_data
from pbkd.data.settings import READER_VERSION, AbsolutePath, DataInfo, DataSettings

__all__ = [
    "READER_VERSION",
    "AbsolutePath",
    "Batch",
    "Data",
    "DataInfo",
    "DataSettings",
    "Reader",
    "data_digest",
    "open_data",
    "resolve_loader",
]
