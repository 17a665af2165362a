"""Many nodes, one cache: who there is, who keeps what, and how all of them hear of a write.

view: the members. ring: who keeps which key and block. coherence: the protocol by which a write is heard of everywhere, as
pure decisions. wire: what daemons say to each other. hub: the daemon's shell around these. membership: where views come
from. What the protocol promises, and why it holds: docs/consistency.md.
"""
