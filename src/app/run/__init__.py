"""The objects of one run: made from its configuration, stopped, resumed and evaluated."""
