"""A finished draft as a model repository: its files, its card, and the folder that holds them. Torch-free."""
