"""Changes a network in memory, all of it or nothing; says what was kept, and refuses what changes more than it says."""
