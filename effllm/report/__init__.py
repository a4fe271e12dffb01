"""What is shown to people: dry runs and results."""
