"""The shared kernel of kos: S3 protocol without I/O, origin access, configuration, clock, tasks, metrics."""
