"""From sources of text to rows of tokens."""
