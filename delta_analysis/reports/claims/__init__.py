"""Room reports/claims."""
