"""Files of records that grow: what is read and appended after a kill."""

from experiments import json_lines


def test_half_a_line_is_not_read_and_cut_off_before_more_is_appended(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, {"a": 1})
    json_lines.append(path, {"b": 2}, {"c": 3})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"d": ')
    assert json_lines.read(path) == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert path.read_bytes() == whole + b'{"d": '  # reading leaves it as it is
    json_lines.append(path, {"e": 5})
    assert path.read_bytes() == whole + b'{"e": 5}\n'
    path.write_bytes(b'{"f": ')
    json_lines.append(path)
    assert json_lines.read(path) == [] and path.read_bytes() == b""
