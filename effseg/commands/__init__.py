"""The commands of `effseg`, one a file: `add_parser` declares the arguments of each.

What a command needs is imported when it runs, so that `effseg --help` answers at once.
"""
