"""``python -m ddk_cache`` runs ``ddk-cache``."""

from ddk_cache.cli.main import main

if __name__ == "__main__":  # a spawned worker imports this module again
    main()
