"""What a run has to say when it is over, or under way."""
