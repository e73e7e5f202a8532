"""The command line of metier: one file per verb; parse, then import, then call."""
