"""The files of one run: its folder, what it came to, its metrics, and the state that they say."""
