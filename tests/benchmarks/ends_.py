"""How a benchmark's command ends on options that cannot be."""

import pytest


def refused(main, options, capsys):
    """The line with which a command ends before it measures."""
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
