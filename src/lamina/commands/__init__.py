"""One module per command: ``arguments(parser)`` says what it takes, ``run(given)`` does it. Its docstring is its help."""
