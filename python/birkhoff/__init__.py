"""Compress Segment Anything models without data, and run them compressed."""
