"""HTTP over the subsystems: OpenAI-compatible completions and chats, and a judge. No text of a request is ever logged."""
