"""The embedded default: a procedural corpus and a small target model that ships with the code."""
