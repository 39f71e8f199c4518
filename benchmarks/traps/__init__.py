"""The traps of other tools, run side by side with ours: `python -m benchmarks.traps`.

One function per trap, in the file of its theme; `rows.trap` registers it. A function that takes a
`Case` can be given a network of your own.
"""
