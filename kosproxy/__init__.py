"""The S3 endpoint of a node: stateless workers that authenticate, answer hits by themselves, and carry everything else."""
