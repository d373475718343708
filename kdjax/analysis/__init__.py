"""What the results say: paired statistics, tables, figures."""
