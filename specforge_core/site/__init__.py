"""The site of results: one static folder, written from records, that opens without a server or a network."""
