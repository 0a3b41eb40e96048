"""The format on disk: manifest, arrays, codec, commit records."""
