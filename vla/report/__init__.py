"""One self-contained HTML page about a folder of results; the command is scripts/report.py."""
