"""The program's modules, in wings: each for one part of the story from an option to a picture. See CONTRIBUTING.md."""
