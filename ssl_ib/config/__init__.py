"""What a run is composed of, and what its configuration is checked by."""
