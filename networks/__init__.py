"""LoRA and its relatives: files and keys (below `library.plan`), and what they do to layers (above `library.draw`)."""
