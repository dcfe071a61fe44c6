"""OpenAI-compatible completions and chats over every decoder, batched without lockstep, streamed as tokens or accepted steps."""
