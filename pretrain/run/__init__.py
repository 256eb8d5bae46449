"""A run as others see it: what lies in its directory, what is recorded, how it stands, and what its processes end with."""
