"""Objects behind a URL: local folders and object stores, and the lock."""
