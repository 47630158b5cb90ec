"""The network: encoder, projector, and the two joined to a language model."""
