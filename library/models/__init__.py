"""Loading: weights read ahead, models built empty and filled, upscalers."""
