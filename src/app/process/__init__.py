"""What concerns this process and the files that it writes, whatever it runs. Needs no torch."""
