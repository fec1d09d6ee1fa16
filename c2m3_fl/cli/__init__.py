"""The command line, ``c2m3-fl``: parse, call, draw."""
