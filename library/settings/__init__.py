"""What each feature is set to, and what an option is. One file a feature; the same name in `draw` does it."""
