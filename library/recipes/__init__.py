"""What the metadata of pictures says of how they were made: one reader for each program that writes it."""
