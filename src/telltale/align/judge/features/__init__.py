"""Hidden states of a frozen backbone: how they are pooled, computed, and kept on disk."""
