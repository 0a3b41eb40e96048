"""What a build would do, before anything is spent: ``--dry-run`` and ``estimate``."""
