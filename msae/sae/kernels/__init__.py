"""The sparse step's inner loops, each written more than once behind the same functions; `plain` is the reference."""
