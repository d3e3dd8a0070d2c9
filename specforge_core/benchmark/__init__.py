"""What a draft does for its target, measured and written down."""
