"""What training keeps an eye on: bad numbers and bad data, stops and hangs, slow ranks, speed and memory."""
