"""`python -m deltamix_hf` is the `deltamix` command."""

from .cli import main

main()
