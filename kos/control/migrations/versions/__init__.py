"""One script for each version of the schema; none is changed once it has been released."""
