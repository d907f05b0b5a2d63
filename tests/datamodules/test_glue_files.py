"""Files in every form, and the sentence that each kind of wrong file gets."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fiftyfold.datamodules.glue_files import find_files, read_file
from fiftyfold.datamodules.glue_tasks import TASKS, get_task
from fiftyfold.errors import FiftyfoldError

SST2, MRPC, COLA, STSB, QQP, MNLI = map(get_task, ("sst2", "mrpc", "cola", "stsb", "qqp", "mnli"))
ODD = "it 's \"half a quote"


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_tsv_knows_no_quotes_and_only_line_feeds(tmp_path):
    text = f"sentence\tlabel\n{ODD}\t1\nbroken\u2028off\x85here\t0\nplain \t1\n"
    rows = read_file(write(tmp_path / "train.tsv", text), SST2)
    assert rows.texts[0] == [ODD, "broken\u2028off\x85here", "plain"]
    assert rows.labels == [1, 0, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_and_windows_lines(tmp_path, end, mark):
    lines = [f"{mark}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tfirst\tsecond", ""]
    rows = read_file(write(tmp_path / "train.tsv", end.join(lines)), MRPC)
    assert rows.texts == (["first"], ["second"])
    assert rows.labels == [1]


def test_cola_has_no_header_but_its_test_file_has(tmp_path):
    rows = read_file(write(tmp_path / "train.tsv", "gj04\t1\t\tFine.\nks08\t0\t*\tNot fine it.\n"), COLA)
    assert rows.texts == (["Fine.", "Not fine it."],)
    assert rows.labels == [1, 0]
    unlabelled = read_file(write(tmp_path / "test.tsv", "index\tsentence\n0\tA one.\n"), COLA, labelled=False)
    assert unlabelled.texts == (["A one."],)
    assert unlabelled.labels is None


def test_mnli_takes_the_gold_label_among_many_columns(tmp_path):
    head = "index\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label"
    path = write(tmp_path / "dev_matched.tsv", f"{head}\n0\tx\t(a)\ta\tb\tneutral\tneutral\tcontradiction\n")
    rows = read_file(path, MNLI)
    assert rows.texts == (["a"], ["b"])
    assert rows.labels == [2]


@pytest.mark.parametrize("comma", ["\t", ","])
@pytest.mark.parametrize("end", ["\n\n", "\r\n \r\n", "\n\t\n"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path, comma, end):
    path = tmp_path / ("train.csv" if comma == "," else "train.tsv")
    rows = read_file(write(path, f"sentence{comma}label\na{comma}1{end}"), SST2)
    assert rows.texts == (["a"],)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_other_forms_give_the_same_rows(tmp_path, form):
    records = [{"sentence": "one,\nline", "label": 1}, {"sentence": ODD, "label": 0}]
    path = tmp_path / f"train.{form}"
    if form == "csv":
        write(path, f'sentence,label\n"one,\nline",1\n"{ODD.replace(chr(34), chr(34) * 2)}",0\n')
    elif form == "jsonl":
        write(path, "".join(json.dumps(record) + "\n" for record in records))
    elif form == "json":
        write(path, json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    rows = read_file(path, SST2)
    assert rows.texts[0] == ["one,\nline", ODD]
    assert rows.labels == [1, 0]


def test_labels_are_names_or_ids(tmp_path):
    rows = read_file(write(tmp_path / "train.tsv", "sentence\tlabel\na\tpositive\nb\t0\n"), SST2)
    assert rows.labels == [1, 0]


def test_minus_one_means_no_label_in_a_test_file(tmp_path):
    path = write(tmp_path / "test.jsonl", '{"sentence": "a", "label": -1}\n')
    assert read_file(path, SST2, labelled=False).labels is None
    with pytest.raises(FiftyfoldError, match="line 1: the label '-1'"):
        read_file(path, SST2)


def test_published_qqp_has_torn_rows(tmp_path):
    good = "1\t2\t3\tWhy?\tHow?\t1\n"
    path = write(
        tmp_path / "train.tsv", f"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n{good}4\t5\t6\ttorn\n{good}"
    )
    with pytest.warns(UserWarning, match="passed over 1 rows"):
        assert len(read_file(path, QQP)) == 2
    write(path, path.read_text() + "torn\n" * 50)
    with pytest.raises(FiftyfoldError, match="line 54: 1 fields"):
        read_file(path, QQP)


WRONG = {
    "empty": ("train.tsv", SST2, "", "train.tsv is empty"),
    "blank": ("train.tsv", SST2, "\n\n", "train.tsv is empty"),
    "header only": ("train.tsv", SST2, "sentence\tlabel\n", "holds no rows"),
    "no text column": ("train.tsv", SST2, "text\tlabel\na\t1\n", "no column 'sentence', which sst2 needs"),
    "no label column": ("train.tsv", MRPC, "#1 String\t#2 String\na\tb\n", "no column 'Quality' or 'label'"),
    "short row": ("train.tsv", SST2, "sentence\tlabel\na\t1\nb\n", "line 3: 1 fields separated by tabs where 2"),
    "long row": ("train.tsv", SST2, "sentence\tlabel\na\tb\t1\n", "line 2: 3 fields"),
    "blank row": ("train.tsv", SST2, "sentence\tlabel\n\na\t1\n", "line 2: 1 fields"),
    "label out of range": ("train.tsv", SST2, "sentence\tlabel\na\t1\nb\t2\n", r"line 3: the label '2' is none of"),
    "label no number": ("train.tsv", SST2, "sentence\tlabel\na\tgood\n", r"0 \(negative\), 1 \(positive\)"),
    "label missing": ("train.jsonl", SST2, '{"sentence": "a", "label": null}\n', "line 1: the label 'None'"),
    "odd digit": ("train.tsv", SST2, "sentence\tlabel\na\t²\n", "line 2: the label '²'"),
    "score too high": ("train.tsv", STSB, "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: the score '5.1'"),
    "score not a number": ("train.tsv", STSB, "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: the score 'nan'"),
    "another task's file": ("train.tsv", STSB, "sentence1\tsentence2\tlabel\na\tb\tentailment\n", "from 0 to 5"),
    "text is a number": (
        "train.jsonl",
        SST2,
        '{"sentence": 3, "label": 1}\n',
        "line 1: column 'sentence' holds no text",
    ),
    "text missing": ("train.jsonl", SST2, '{"sentence": "a", "label": 1}\n{"label": 1}\n', "line 2: column 'sentence'"),
    "not JSON": ("train.jsonl", SST2, '{"sentence": "a", "label": 1}\n{"sent\n', "line 2: not JSON"),
    "JSON without columns": ("train.jsonl", SST2, '["a", 1]\n', "line 1: not a"),
    "JSON goes on": ("train.jsonl", SST2, '{"sentence": "a", "label": 1} 5\n', "line 1: not JSON"),
    "half a character": ("train.jsonl", SST2, '{"sentence": "a \\ud83d", "label": 1}\n', "line 1: .*half a character"),
    "brackets": ("train.jsonl", SST2, f'{{"sentence": {"[" * 200_000}', "line 1: too many brackets"),
    "digits": ("train.jsonl", SST2, f'\n{{"sentence": "a", "label": {"1" * 5000}}}', "line 2: a number of too many"),
    "long number": ("train.jsonl", SST2, f'{{"sentence": "a", "label": {"1" * 4000}}}', "line 1: the label '1{60}…'"),
    "label is a list": ("train.jsonl", SST2, f'{{"sentence": "a", "label": {"[" * 500 + "]" * 500}}}', "label 'list'"),
    "array: half a character": (
        "train.json",
        SST2,
        '[\n{"sentence": "a", "label": 1},\n\n{"sentence": "\\udc00", "label": 1}]',
        "line 4: .*half a character",
    ),
    "array: brackets": ("train.json", SST2, f'[\n{{"sentence": {"[" * 200_000}', "line 2: too many brackets"),
    "array: digits": ("train.json", SST2, f'\n[\n{{"label": {"1" * 5000}}}]', "line 3: a number of too many"),
    "array: torn": ("train.json", SST2, '[{"sentence": "a", "label": 1},\n{"sentence":\n"b', "line 3: not JSON"),
    "array: no comma": ("train.json", SST2, '[{"sentence": "a", "label": 1}\n{}]', "line 2: not JSON .no comma"),
    "array: goes on": ("train.json", SST2, '[{"sentence": "a", "label": 1}]\n,', "after the array's end"),
    "array: empty": ("train.json", SST2, "[ ]", "train.json is empty"),
    "CSV row": ("train.csv", SST2, "sentence,label\na,b,1\n", "line 2: 3 fields separated by commas"),
    "CSV quotes": ("train.csv", SST2, 'sentence,label\n"a" b,1\n', "line 2: not readable as CSV"),
    "no parquet": ("train.parquet", SST2, "PAR1 no", "is not a readable parquet file"),
    "unknown form": ("train.xlsx", SST2, "x", "is in no known form"),
}


@pytest.mark.parametrize(("name", "task", "text", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files_get_one_sentence_with_file_and_line(tmp_path, name, task, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(FiftyfoldError, match=message) as caught:
        read_file(path, task)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_encodings_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "train.tsv", "sentence\tlabel\na\t1\ncafé\t0\n", encoding="latin-1")
    with pytest.raises(FiftyfoldError, match=r"train.tsv, line 3: byte 0xe9 is not UTF-8"):
        read_file(path, SST2)


def test_missing_file(tmp_path):
    with pytest.raises(FiftyfoldError, match="does not exist"):
        read_file(tmp_path / "train.tsv", SST2)


def test_finds_the_tasks_folder_or_takes_the_folder_itself(tmp_path):
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        write(tmp_path / "SST-2" / name, "x")
    expected = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    for folder in (tmp_path, tmp_path / "SST-2"):
        assert {split: path.name for split, path in find_files(folder, SST2).items()} == expected


def test_finds_the_hubs_layout_and_other_names(tmp_path):
    write(tmp_path / "mnli" / "train-00000-of-00001.parquet", "x")
    write(tmp_path / "mnli" / "validation_matched.csv", "x")
    write(tmp_path / "mnli" / "dev_mismatched.jsonl", "x")
    assert {split: path.name for split, path in find_files(tmp_path, MNLI).items()} == {
        "train": "train-00000-of-00001.parquet",
        "validation_matched": "validation_matched.csv",
        "validation_mismatched": "dev_mismatched.jsonl",
    }


def write_shards(folder, count=3):
    for number in range(count):
        table = pyarrow.Table.from_pylist([{"sentence": f"row {number}", "label": number % 2}])
        pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-{count:05d}.parquet")


def test_shards_are_one_split_in_their_order(tmp_path):
    write_shards(tmp_path)
    rows = read_file(find_files(tmp_path, SST2)["train"], SST2)
    assert rows.texts == (["row 0", "row 1", "row 2"],)
    assert rows.labels == [0, 1, 0]
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FiftyfoldError, match=r"train-00001-of-00003.parquet does not exist"):
        read_file(find_files(tmp_path, SST2)["train"], SST2)


def test_folder_troubles(tmp_path):
    with pytest.raises(FiftyfoldError, match="does not exist"):
        find_files(tmp_path / "nowhere", SST2)
    with pytest.raises(FiftyfoldError, match=r"holds none of sst2's files; expected train.tsv"):
        find_files(tmp_path, SST2)
    write(tmp_path / "train.tsv", "x")
    write(tmp_path / "train.csv", "x")
    with pytest.raises(FiftyfoldError, match=r"train.tsv and train.csv for one split"):
        find_files(tmp_path, SST2)


COUNTS = {
    "cola": {"train": 8551, "validation": 1043, "test": 1063},
    "sst2": {"train": 67349, "validation": 872, "test": 1821},
    "mrpc": {"train": 3668, "validation": 408, "test": 1725},
    "stsb": {"train": 5749, "validation": 1500, "test": 1379},
    "rte": {"train": 2490, "validation": 277, "test": 3000},
    "wnli": {"train": 635, "validation": 71, "test": 146},
    "qnli": {"train": 9999, "validation": 5463, "test": 5463},
    "mnli": {"train": 9999, "validation_matched": 9815},
    "qqp": {"train": 31868, "validation": 1000},
    "ax": {"test": 1104},
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", COUNTS)
def test_real_files_read_whole(shared_data, name):
    task = TASKS[name]
    rows = {
        split: read_file(path, task, labelled=split not in task.test_splits)
        for split, path in find_files(shared_data / "glue", task).items()
    }
    assert {split: len(found) for split, found in rows.items()} == COUNTS[name]
    for split, found in rows.items():
        assert (found.labels is None) == split.startswith("test")
        if found.labels is not None and not task.is_regression:
            assert set(found.labels) == set(range(task.num_labels))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte", "qnli", "mnli", "qqp"])
def test_sixteen_shot_files_read_whole(shared_data, name):
    task = TASKS[name]
    files = find_files(shared_data / "kshot16_seed13", task)
    for split in ("train", task.validation_splits[0]):
        rows = read_file(files[split], task)
        assert len(rows) == (32 if task.is_regression else 16 * task.num_labels)
        if not task.is_regression:
            assert all(rows.labels.count(label) == 16 for label in range(task.num_labels))


@pytest.mark.parametrize("head", ["sentence\tlabel\tlabel", "sentence\tsentence\tlabel"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, head):
    with pytest.raises(FiftyfoldError, match=r"two columns '(label|sentence)'"):
        read_file(write(tmp_path / "train.tsv", f"{head}\na\t0\t1\n"), SST2)
