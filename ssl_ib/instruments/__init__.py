"""What `ssl-ib-info` shows of the information that encoders keep and drop: a module a command, named in `COMMANDS`.

A module has `HELP`, a line; `arguments(parser)`, which adds its arguments and imports nothing heavy; and
`run(options) -> int`, which does the work and returns the exit code. The estimators themselves are in `ssl_ib.info`.
"""

#: The modules of this package that are commands, in the order in which they are listed.
COMMANDS: tuple[str, ...] = ("calibrate", "plane", "views", "probe", "rank")
