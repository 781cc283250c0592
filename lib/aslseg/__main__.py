"""``python -m aslseg`` is the command ``aslseg``."""

from aslseg.cli import main

main()
