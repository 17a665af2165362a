"""The shared kernel of kos: S3 protocol without I/O, origin access, configuration, clock, tasks, metrics."""

__version__ = "0.1.0"
