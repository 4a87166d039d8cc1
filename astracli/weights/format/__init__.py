"""The bytes of a version: manifest, pieces, digests, coding of differences."""
