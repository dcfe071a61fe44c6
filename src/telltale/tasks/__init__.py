"""Data with a verifier: a task can read or generate examples, format them and check an answer."""
