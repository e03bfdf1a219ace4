"""The commands of `effseg`, one per file; `add_parser` declares the arguments.

Imports happen when a command runs, so that `effseg --help` is fast.
"""
