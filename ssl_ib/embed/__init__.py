"""Features of a folder of images, written to a file as they are computed: memory does not grow with their number.

The images are walked in the order of their names (`listing`). Features go to `OUT.part` row by row, and what goes with
them to `OUT.part.json` and `OUT.part.unreadable`; a run that was ended goes on from the last whole row (`features`). At
the end the file gets its header and its name, and names and labels stand in a table beside it, `OUT.csv` (`files`).
"""
