"""What is read: weight files, models and what tells their family, embeddings, pictures. Nothing is loaded here."""
