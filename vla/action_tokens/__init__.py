"""Actions as tokens of a language model: one module per vocabulary."""
