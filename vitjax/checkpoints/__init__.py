"""Checkpoints: `store` talks to Orbax, `steps` knows a folder of them, `policy` says which are
kept, `run` saves and restores those of a run, `verb` is the command."""
