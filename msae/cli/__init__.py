"""From a command line to a call: composing, checking, errors of one line, sweeps and their tables."""
