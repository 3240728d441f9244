"""Learning to rank with one model for every trade-off."""
