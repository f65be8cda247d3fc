"""Settings of every Ray that pbkd starts."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "METRICS_RECORD_INTERVAL_S": "60",
    "RAY_metrics_report_interval_ms": "60000",
}
"""Variables of the environment: nobody here reads what Ray counts of itself, by default every few seconds."""
