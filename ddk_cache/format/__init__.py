"""What lies on disk: manifest, arrays, codec, commit records."""
