import os
import subprocess
import sys

from transformers import AutoTokenizer

from fisher_lab.config.workload import DataConfig
from fisher_lab.workload import text, tokenizer


def passages(directory):
    data = DataConfig(type="text_file", path=str(directory))
    return text.split(text.load(data), 0.2)[0]


def test_any_text_comes_back_as_it_was(text_directory, tmp_path):
    path = tokenizer.cached(passages(text_directory), 400, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(path))
    assert len(loaded) == 400
    for sample in (
        "def f(x):\n\treturn x ** 2  # ok",
        "żółć 漢字 🙂\r\n",
        "  two  spaces ",
        "\x00",
    ):
        ids = loaded(sample, add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids) == sample


def test_special_tokens_are_where_the_tasks_look_for_them(text_directory, tmp_path):
    loaded = tokenizer.load(tokenizer.cached(passages(text_directory), 400, tmp_path))
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2)
    assert (loaded.cls_token_id, loaded.sep_token_id, loaded.bos_token_id) == (3, 4, 1)
    assert tokenizer.sentinels(loaded) == list(range(5, 37))


def test_the_name_in_the_cache_is_made_of_what_decides(text_directory):
    ours = passages(text_directory)
    name = tokenizer.key(ours, 400)
    assert tokenizer.key(list(ours), 400) == name
    assert tokenizer.key(ours, 401) != name
    assert tokenizer.key(ours[1:], 400) != name


def test_training_twice_gives_the_same_tokenizer(text_directory):
    ours = passages(text_directory)
    first, second = (tokenizer.train(ours, 400) for _ in range(2))
    assert tokenizer.sha256(first) == tokenizer.sha256(second)
    assert tokenizer.sha256(first) != tokenizer.sha256(tokenizer.train(ours, 399))


CHILD = """
import os, sys
from pathlib import Path
from fisher_lab.config.workload import DataConfig
from fisher_lab.workload import text, tokenizer
train = tokenizer.train
def counted(*arguments):
    with open(sys.argv[3], "a") as log:
        log.write(f"{os.getpid()}\\n")
    return train(*arguments)
tokenizer.train = counted
data = DataConfig(type="text_file", path=sys.argv[1])
passages = text.split(text.load(data), 0.2)[0]
import transformers
print("ready", flush=True)
sys.stdin.readline()
print(tokenizer.sha256(tokenizer.load(tokenizer.cached(passages, 400, Path(sys.argv[2])))))
"""


def test_two_processes_that_start_at_once_train_it_once(text_directory, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(text_directory), str(cache), str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    hashes = [child.communicate(timeout=120)[0] for child in children]
    assert hashes[0] == hashes[1] != ""
    assert len(log.read_text().splitlines()) == 1
    assert len(os.listdir(cache / "tokenizers")) == 1
