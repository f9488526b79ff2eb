"""Races: artifacts against one another and against peers, rounds interleaved, on this machine."""
