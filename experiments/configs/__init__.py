"""One file per task; its docstring holds the command, the hardware and the expected result."""
