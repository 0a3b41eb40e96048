"""Configuration files, progress and processes."""
