"""What several test files use."""
import io
import sys

import pytest


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(script, *arguments) runs a script's main() in an empty folder.

    It returns the exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments, stdin=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            script.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run
