"""`kos demo`: an origin and a node in a temporary directory, toured with a real S3 client."""
