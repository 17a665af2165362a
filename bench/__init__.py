"""The figures of kos: one module per figure, the servers they need, and the files the results go to."""
