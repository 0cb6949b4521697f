"""A run and all that it is made of: student, teacher, responses, loop, checkpoints, trackers, process groups.

Also what the other commands do: check, generate, capture, evaluate and export.
"""
