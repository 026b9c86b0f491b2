"""What is read: weight files, models and what tells their family, embeddings, pictures. Models are loaded elsewhere."""
