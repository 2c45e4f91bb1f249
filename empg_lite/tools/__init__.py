"""What a person does with a run."""
