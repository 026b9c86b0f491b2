"""From a batch of jobs to pictures: text, noise, the U-Net and what steers it, the VAE."""
