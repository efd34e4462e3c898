"""What scripts/bench.py measures, one file each: `measure` takes the figures, `show` makes a table of them."""
