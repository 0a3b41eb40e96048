"""Read, write and verify a cache."""
