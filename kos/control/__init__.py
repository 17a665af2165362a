"""The control store: what must not be lost, and what the nodes of a region share.

errors: what can go wrong. database: the way to SQLite or PostgreSQL, bounded in time. tables: what stands there.
migrations: how it came to stand there. members: who belongs to the cluster.
"""
