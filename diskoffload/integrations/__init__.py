"""Other libraries, each optional and each thin."""
