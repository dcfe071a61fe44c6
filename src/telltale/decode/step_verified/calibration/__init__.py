"""Choosing a threshold with a promise: fitting scales on pilot problems, controlling the risk, the file that holds for one pair."""
