"""Job files: rows of CSV and objects of JSON are prompt lines, with the same checks and places of their own."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library.errors import InputError
from library.plan.prompt_lines import PROMPT_OPTIONS, parse_prompt_line
from library.plan.sources import read_prompt_file

CSV = """\
prompt,n,Width,h,seed,l
a red circle,bad,64,72,"1,2",

"a ""quoted"", long
  prompt",,{64|72},64,,1.5
,,,,,
# no comment, but a hash,,,,,
"""
JSONL = """\
{"prompt": "a red circle", "n": "bad", "width": 64, "h": 72, "d": [1, 2], "l": null}
 \t
{"guidance_scale": 1.5, "prompt": "a \\"quoted\\", long\\r\\n  prompt", "h": "64", "w": "{64|72}"}
{"prompt": "# no comment", "n": "but a hash"}
"""
LINES = [
    "a red circle --n bad --w 64 --h 72 --d 1,2",
    'a "quoted", long prompt --w {64|72} --h 64 --l 1.5',
    "# no comment --n but a hash",
]


def rows(tmp_path: Path, kind: str, content: str | bytes) -> list:
    file = tmp_path / f"jobs.{kind}"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompt_file(str(file))


@pytest.mark.parametrize("kind", ["csv", "CSV"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_csv_are_lines(tmp_path, kind, end):
    content = CSV.replace("# no comment, but a hash,,,,,", "# no comment,but a hash,,,,").replace("\n", end)
    lines = rows(tmp_path, kind, "\ufeff" + content)
    assert [line.text for line in lines] == LINES
    assert [line.where for line in lines] == [f"{tmp_path}/jobs.{kind}:{number}" for number in (2, 4, 7)]


def test_objects_of_json_are_lines(tmp_path):
    lines = rows(tmp_path, "jsonl", JSONL)
    assert [line.text for line in lines] == LINES
    assert [line.where for line in lines] == [f"{tmp_path}/jobs.jsonl:{number}" for number in (1, 3, 4)]


def test_every_option_of_lines_is_a_column_by_both_names(tmp_path):
    for option in PROMPT_OPTIONS.values():
        for name in (option.name, option.sets):
            if "." in name:
                continue
            value = {"nl": "none", "f": "x", "t": "0.5", "w": "64", "h": "64"}.get(option.name, "7")
            row = json.dumps({name: value, "prompt": "a"})
            try:
                expected = parse_prompt_line(f"a --{option.name} {value}").settings
            except InputError:
                continue  # what takes no such number is refused as a line
            assert parse_prompt_line(rows(tmp_path, "jsonl", row)[0].text).settings == expected, name


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", "prompt,stepps\na,b", "stepps (FILE:1): no such column; did you mean steps?"),
        ("csv", "prompt,scale\na,3", "scale (FILE:1): no such column; did you mean l?"),
        ("csv", "prompt;w\na;5", "prompt;w (FILE:1): is one column; put commas"),
        ("csv", "n,w\na,64", "the header (FILE:1): has no column prompt"),
        ("csv", "prompt,w,Width\na,64,", "Width (FILE:1): is the same column as w"),
        ("csv", "prompt,\na,b", "a column without a name (FILE:1): no such column"),
        ("csv", "prompt,n\n\na, b,c", "the row (FILE:3): has 3 cells, the header 2"),
        ("csv", "prompt,n\na", "the row (FILE:2): has 1 cells, the header 2"),
        ("csv", 'prompt,n\na,"b', "FILE:2: is no CSV"),
        ("csv", 'prompt,n\na,"b"c', "FILE:2: is no CSV"),
        ("csv", 'prompt,n\n"x\ny",b\na,c --w 64', "c --w 64 (FILE:4, column n): would begin another option"),
        ("csv", "prompt,d\na,--w 64", "--w 64 (FILE:2, column d): would begin another option"),
        ("csv", "prompt,n\na {x,y}", "{ (FILE:2, column prompt): is never closed"),
        ("csv", "", "--from_file FILE: holds no row"),
        ("csv", "prompt,n\n,\n", "--from_file FILE: holds no row"),
        ("csv", b"prompt\n\xe9", "--from_file FILE: line 2, byte 1: 0xE9 is not UTF-8"),
        ("jsonl", "[1]", "the row (FILE:1): is no JSON object"),
        ("jsonl", '{"prompt": "a"}\n{"prompt": }', "the row (FILE:2): is no JSON (Expecting value, column 12)"),
        ("jsonl", "[" * 100_000, "the row (FILE:1): is no JSON"),
        ("jsonl", '{"s": ' + "9" * 5000 + "}", "FILE:1"),
        ("jsonl", '{"prompt": "a", "w": NaN}', "the row (FILE:1): holds NaN"),
        ("jsonl", '{"prompt": "a", "prompt": "b"}', "the row (FILE:1): holds 'prompt' twice"),
        ("jsonl", '{"d": 1, "seed": 1}', "seed (FILE:1): says the same as d"),
        ("jsonl", '{"prompt": 5}', "5 (FILE:1, column prompt): is a number; write a text"),
        ("jsonl", '{"n": ["a"]}', '["a"] (FILE:1, column n): is a list; write a text'),
        ("jsonl", '{"w": [64]}', '["64"] (FILE:1, column w): is a list; write a number or a text'),
        ("jsonl", '{"w": true}', "true (FILE:1, column w): is true or false"),
        ("jsonl", '{"d": []}', "[] (FILE:1, column d): is an empty list"),
        ("jsonl", '{"d": {"a": 1}}', "(FILE:1, column d): is an object"),
        ("jsonl", '{"prompt": "a\\u0000b"}', "prompt (FILE:1, column prompt): holds what is no text"),
        ("jsonl", '{"prompt": "a\\ud800b"}', "prompt (FILE:1, column prompt): holds what is no text"),
        ("jsonl", "{}", "the row (FILE:1): says nothing"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, kind, content, message):
    with pytest.raises(InputError) as error:
        lines = rows(tmp_path, kind, content)
        parse_prompt_line(lines[0].text, lines[0].where, lines[0].cells)
    assert message.replace("FILE", str(tmp_path / f"jobs.{kind}")) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_values_are_refused_with_their_line_and_column_all_at_once(sd1, generate, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(
        'prompt,height,steps,n\na,65,,\n"b,\nc",,1e3,\nd {1|2} --w 63,,,\n'
        "{e|e} --q 5,64,,x\nf,{64.0|64.5},,\nf --n x,,,y\n"
    )
    result = generate(sd1.folder, "--from_file", jobs, "--dry_run")
    assert result.status == 2
    errors = [line.removeprefix("error: ").replace(str(jobs), "jobs.csv") for line in result.stderr.splitlines()]
    assert [error.partition("):")[0] + ")" for error in errors] == [
        "--h 65 (jobs.csv:2, column height)",
        "--s 1e3 (jobs.csv:3, column steps)",
        "--w 63 (jobs.csv:5, column prompt)",
        "--q (jobs.csv:6, column prompt)",
        errors[4].partition("):")[0] + ")",
        "--n (jobs.csv:8, column n)",
    ]
    assert errors[4].startswith("--h 64.") and "(jobs.csv:7, column height): not a whole number" in errors[4]


def test_pictures_of_rows_are_those_of_lines(sd1, generate, tmp_path):
    (tmp_path / "wild").mkdir()
    (tmp_path / "wild" / "colour.txt").write_text("red\nblue\n")
    common = ("--wildcard_dir", tmp_path / "wild", "--seed", 4, "--sequential_file_name")
    row = {"prompt": "a __colour__ {x|y}\nz", "n": "{no|not} __colour__", "w": 72, "steps": 3, "d": "8,9", "l": 2.5}
    line = "a __colour__ {x|y} z --n {no|not} __colour__ --w 72 --s 3 --d 8,9 --l 2.5"
    texts = []
    for name, content in (("p.jsonl", json.dumps(row)), ("p.list", line)):
        (tmp_path / name).write_text(content)
        result = generate(
            sd1.folder, "--from_file", tmp_path / name, *common, "--images_per_prompt", 2, outdir=tmp_path / name[2:]
        )
        assert result.status == 0, result.stderr
        texts.append([Image.open(file).text for file in result.files])
    assert texts[0] == texts[1]
    assert texts[0][1]["seed"] == "9" and texts[0][0]["raw-prompt"] == line


def test_a_run_goes_on_when_its_file_has_grown(sd1, generate, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("prompt,w\na,64\n")
    command = (sd1.folder, "--from_file", jobs, "--resume", "--seed", 3)
    assert len(generate(*command).files) == 1
    jobs.write_text("w,prompt\n72,b\n64,a\n")
    assert len(generate(*command).files) == 1
    assert generate(*command).files == []
    jobs.write_text("w,prompt\n72,c\n64,a\n")
    assert "the prompt 'b --w 72' of the run to resume is changed or gone" in generate(*command).stderr
