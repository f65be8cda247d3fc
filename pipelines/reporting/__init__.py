"""The report of a pipeline: its facts, the figures drawn of them, one HTML page and PNG files."""
