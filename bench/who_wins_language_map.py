"""."""
def report(out, rows):
    return 0
