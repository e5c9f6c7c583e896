"""What surrounds a run in its process: its log and streams, its lock, restarts, failures and exit codes."""
