"""A run as it happens: batches, failures, interruptions, several processes, the manifest, the loop at the keyboard."""
