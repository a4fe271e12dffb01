"""How other programs open compressed folders: transformers, peft, lm-eval, any Python process."""
