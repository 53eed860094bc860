"""Files of problems, and what is read from them or refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.sources import read as read_source


def jsonl(folder, *rows, name="a.jsonl"):
    """A file with a JSON object, or the text that is given, on each line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def read(name, **settings):
    return [(p.question, p.answer) for p in read_source(SourceConfig(name, **settings))[0]]


def refusal(name, **settings):
    with pytest.raises(ConfigError) as refused:
        read(name, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(rows, path):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(rows, path, separator=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def write_tsv(rows, path):
    write_csv(rows, path, "\t")


WRITERS = {
    **{".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".tsv": write_tsv},
    ".parquet": write_parquet,
}
