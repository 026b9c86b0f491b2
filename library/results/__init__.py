"""What becomes of pictures: their metadata, files, contact sheets and web page."""
