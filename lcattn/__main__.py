"""`python -m lcattn`: the command line of cli.py."""

from .cli import app

app(prog_name="lcattn")
