"""Side-by-side measurement of the ops against other libraries: behind `python -m fastdiff bench`."""
