"""Programs beside the library; run them from the checkout's root, for example ``python -m tools.demo``."""
