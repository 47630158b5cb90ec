"""Pictures to pixels, and conversations to the token ids of a prompt."""
