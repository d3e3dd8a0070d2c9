"""From prompts to what training reads: regenerated conversations, the draft vocabulary, packed batches."""
