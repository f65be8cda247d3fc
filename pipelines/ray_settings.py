"""Settings of every Ray that pbkd starts."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "METRICS_RECORD_INTERVAL_S": "60",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_prestart_worker_first_driver": "0",
}
"""Nobody here reads what Ray counts of itself every few seconds, and jobs start workers of their own."""
