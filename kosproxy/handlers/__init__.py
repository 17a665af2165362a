"""What is done for a request that may be carried out: object reads, writes, and everything that only passes through."""
