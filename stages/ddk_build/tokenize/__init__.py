"""Tokenise the domains into token shards, in many processes."""
