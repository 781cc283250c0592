"""Commands of ``aslseg`` that need more than a function in :mod:`aslseg.cli`."""
