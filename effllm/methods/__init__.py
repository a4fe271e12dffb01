"""One file a method. Names with a leading underscore are helpers, not methods."""
