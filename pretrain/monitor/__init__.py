"""Watches training: bad numbers and bad data, stop requests and hangs, slow ranks, speed and memory."""
