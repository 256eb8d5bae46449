"""Jobs that are killed, stopped or interrupted at every point of a step and of a save; disks that fail at every call of a save."""
