"""Saying whether it is so: functions that return findings."""
